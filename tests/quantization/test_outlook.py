"""What is said before the work is what builds then read."""

from __future__ import annotations

import pytest

from hal.ir import Graph
from hal.passes.base import Pipeline
from hal.passes.quantize import Quantize
from hal.passes.quantize.calibration import Calibration
from hal.passes.quantize.formats import parse_recipe
from hal.quantization import parse_request, quantize_graph
from hal.quantization.outlook import outlook, reading_text
from hal.targets import load_backend, resolve
from tests.kernels.support import chip
from tests.passes.quantize.cnn import calibration, network
from tests.passes.quantize.toy import language_model
from tests.passes.toys import Toy

TARGETS = ("host:onnxruntime", "host:tvm")


def expected_and_read(
    graph: Graph, recipe: str, target: str, data: Calibration | None = None
) -> tuple[int, int, tuple[str, ...]]:
    """Bytes foretold, bytes of the graph as the target runs it, and what was said to lack."""
    chip = resolve(target)
    step = Quantize(parse_recipe(recipe), {}, None, data)
    (found,) = outlook(graph, step, [chip])
    quantized, _ = Pipeline("test", (step,)).run(graph)
    backend = load_backend(chip.backend)
    read = backend.weights_read(backend.legalize(quantized, chip.descriptor))
    assert read is not None
    assert bool(found.lacking) == bool(read.reasons)
    return found.bytes, read.bytes, found.lacking


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("recipe", ["w8a8", "w4a16", "w3a16", "w2a16-asym", "fp8", "mxfp4"])
def test_a_language_model_reads_what_was_foretold(recipe: str, target: str) -> None:
    expected, read, _ = expected_and_read(language_model(256, 512), recipe, target)
    assert expected == pytest.approx(read, rel=0.02)


@pytest.mark.parametrize("target", TARGETS)
def test_matrices_of_heads_read_what_was_foretold(target: str) -> None:
    toy = Toy(x=["batch", 4, "sequence", 64])
    toy.output(toy("Relu", toy("MatMul", toy.x, toy.weight(4, 64, 32))), "y")  # each is small
    expected, read, lacking = expected_and_read(toy.graph(), "w4a16", target)
    assert expected == pytest.approx(read, rel=0.02)
    assert not lacking


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("recipe", ["w8a8", "w8a16"])
def test_a_convolutional_network_reads_what_was_foretold(recipe: str, target: str) -> None:
    expected, read, lacking = expected_and_read(network(), recipe, target, calibration())
    assert expected == pytest.approx(read, rel=0.1)
    if recipe == "w8a16" or (target == "host:tvm" and chip("host").dot is None):
        assert any("(conv) has no kernel of its own, no gain expected" in each for each in lacking)


def test_formats_that_become_floats_gain_nothing() -> None:
    step = Quantize(parse_recipe("fp8"))
    runtime, generated = outlook(language_model(256, 512), step, [resolve(t) for t in TARGETS])
    assert "no gain in speed expected" in str(runtime)
    assert "fp8a16-g32 (linear, head) has no kernel of its own" in str(runtime)
    assert generated.bytes * 2.9 < generated.float_bytes
    assert not generated.lacking


def test_it_is_said_before_the_data_is_looked_at() -> None:
    said: list[str] = []
    chip = resolve("host:onnxruntime")
    request = parse_request("w4a16")
    assert request is not None
    result, _ = quantize_graph(
        language_model(64), request, chip.descriptor, targets=[chip], say=said.append
    )
    assert said[0].startswith("note: host:onnxruntime: reads ")
    facts = result.metadata["quantization"]
    assert said[0] == f"note: {facts['outlook'][0]['sentence']}"
    assert facts["float_bytes_read"] == facts["outlook"][0]["float_bytes"]


def test_gains_are_put_in_words() -> None:
    assert "up to 4.0 times faster" in reading_text(250_000_000, 1_000_000_000, "token")
    assert reading_text(95, 100, "call").endswith("no gain in speed expected")
    assert "slower than floats" in reading_text(150, 100, "call")
