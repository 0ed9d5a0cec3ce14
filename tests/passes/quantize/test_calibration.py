from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hal import InputError
from hal.ir import Graph, State
from hal.passes.base import Pipeline
from hal.passes.quantize import METADATA_KEY, Quantize, find_layers, parse_recipe
from hal.passes.quantize import quantize as quantize_module
from hal.passes.quantize.calibration import Calibration
from hal.passes.quantize.streaming import Seen, Streaming, find_stages, round_activations
from tests.passes.quantize.test_quantize import distance
from tests.passes.quantize.toy import language_model
from tests.passes.toys import Toy

TOKENS = np.random.default_rng(1).integers(0, 96, (24, 20))


def samples(*arrays: np.ndarray) -> list[dict[str, np.ndarray]]:
    return [{"ids": array} for array in arrays]


def quantized(graph: Graph, recipe: str, calibration: Calibration | None, **more: Any) -> Graph:
    step = Quantize(parse_recipe(recipe), calibration=calibration, **more)
    return Pipeline("test", (step,)).run(graph)[0]


def test_token_batches_come_with_state_that_has_seen_nothing() -> None:
    toy = Toy(past=["batch", 2, "past", 8])
    ids = toy.add_input("ids", ["batch", "sequence"], "INT64")
    toy.output(toy("Gather", toy.weight(96, 8), ids), "logits")
    toy.output(toy("Identity", toy.past), "present")
    graph = toy.graph()
    axes = ("batch", "head", "position", "channel")
    graph.state = (State("0.key", "past", "present", "key", axes, 2),)
    found = Calibration.from_tokens(graph, np.zeros((150, 20), np.int32))
    assert [s["ids"].shape for s in found.samples] == [(51, 20), (51, 20), (48, 20)]
    assert found.samples[2]["past"].shape == (48, 2, 0, 8)
    assert found.samples[0]["ids"].dtype == np.int64
    found.check(graph)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ([], "the calibration data is empty"),
        (samples(np.zeros((0, 4), np.int64)), "'ids' is empty"),
        (samples(np.zeros(4, np.int64)), "'ids' is int64[4]"),
        (samples(np.zeros((1, 4), np.float32)), "'ids' is float32[1, 4]"),
        ([{}], "input 'ids' is missing"),
        ([{"ids": np.zeros((1, 4), np.int64), "mask": np.ones(4)}], "no input 'mask'"),
        (samples(np.full((1, 4), 96)), "'ids' holds 96 to 96, the vocabulary has 96 tokens"),
    ],
)
def test_samples_that_do_not_fit_are_named(given: list[dict[str, np.ndarray]], text: str) -> None:
    graph = language_model()
    graph.metadata |= {"task": "causal-lm", "vocab_size": 96}
    with pytest.raises(InputError) as raised:
        quantized(graph, "w4a16:gptq", Calibration(given))
    assert text in raised.value.message
    assert raised.value.hint


def test_samples_that_are_not_finite_are_named() -> None:
    toy = Toy(x=["batch", 64])
    toy.output(toy("MatMul", toy.x, toy.weight(64, 80)), "y")
    bad = np.full((2, 64), np.nan, np.float32)
    with pytest.raises(InputError, match="sample 1: 'x' holds infinities or NaN"):
        quantized(toy.graph(), "w4a16:gptq", Calibration([{"x": np.ones_like(bad)}, {"x": bad}]))


def test_tokens_of_another_kind_are_refused() -> None:
    for tokens in (np.zeros((2, 3), np.float32), np.zeros(5, np.int64), np.zeros((0, 4), int)):
        with pytest.raises(InputError, match="calibration tokens are"):
            Calibration.from_tokens(language_model(), tokens)


def test_methods_that_look_at_data_need_some() -> None:
    with pytest.raises(InputError, match="'gptq' needs calibration data"):
        quantized(language_model(), "w4a16:gptq", None)


def _grams(graph: Graph, given: Calibration) -> dict[str, np.ndarray]:
    layers = [layer for layer in find_layers(graph) if layer.kind != "embedding"]
    found: dict[str, np.ndarray] = {}

    def visit(layer: Any, seen: Seen) -> None:
        weight = np.zeros(layer.shape, np.float32)
        found[layer.name] = seen.statistics(layer, weight).gram

    Streaming(graph, given, find_stages(graph, layers), correct=False).run(visit)
    return found


@pytest.mark.parametrize("spill", [0, 1 << 30])
def test_statistics_of_a_stream_are_those_of_the_whole_graph(spill: int) -> None:
    graph = language_model()
    parts = samples(*(TOKENS[i : i + 8] for i in range(0, 24, 8)))
    found = _grams(graph, Calibration(parts, spill_bytes=spill))
    from hal.ir.evaluate import evaluate

    for layer in find_layers(graph):
        if layer.kind == "embedding":
            continue
        value = layer.products[0].inputs[0]
        assert value is not None
        x = evaluate(graph, {"ids": TOKENS}, [value.name or ""])[value.name]
        rows = x.reshape(-1, x.shape[-1])
        np.testing.assert_allclose(found[layer.name], rows.T @ rows / len(rows), 1e-4, 1e-3)


@pytest.mark.parametrize(
    ("recipe", "tied"),
    [("w4a16", False), ("w4a8", False), ("w3a16-asym", False), ("w2a16", True), ("w3a16", True)],
)
def test_calibrated_results_are_better_than_rounded_ones(recipe: str, tied: bool) -> None:
    graph = language_model(tied=tied)
    everywhere = f",head={recipe}:gptq" if tied else ""
    rounded = quantized(graph, recipe + everywhere.replace(":gptq", ""), None)
    found = quantized(graph, f"{recipe}:gptq{everywhere}", Calibration(samples(TOKENS)))
    assert distance(graph, found) < 0.95 * distance(graph, rounded)
    assert found.weight_bytes() == rounded.weight_bytes()
    methods = {r["name"]: r["method"] for r in found.metadata[METADATA_KEY]["layers"]}
    assert methods["first"] == methods["second"] == "gptq"


def test_a_run_that_was_interrupted_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, calibration = language_model(), Calibration(samples(TOKENS), tmp_path)
    done: list[tuple[int, ...]] = []
    inner = quantize_module.gptq

    def counted(stop: int) -> Callable[..., Any]:
        def call(weight: np.ndarray, *rest: Any) -> Any:
            if len(done) == stop:
                raise KeyboardInterrupt
            done.append(weight.shape)
            return inner(weight, *rest)

        return call

    monkeypatch.setattr(quantize_module, "gptq", counted(1))
    with pytest.raises(KeyboardInterrupt):
        quantized(graph, "w4a16:gptq", calibration)
    monkeypatch.setattr(quantize_module, "gptq", counted(99))
    resumed = quantized(graph, "w4a16:gptq", calibration)
    assert done == [(128, 64), (64, 128)]
    again = quantized(graph, "w4a16:gptq", calibration)
    assert len(done) == 2
    fresh = quantized(graph, "w4a16:gptq", Calibration(samples(TOKENS)))
    assert distance(resumed, fresh) == distance(again, fresh) == 0
    quantized(graph, "w3a16:gptq", calibration)
    assert len(done) == 6  # another setting starts anew


def test_progress_names_every_layer() -> None:
    seen: list[tuple[int, int, str]] = []
    quantized(
        language_model(),
        "w4a16:gptq",
        Calibration(samples(TOKENS)),
        progress=lambda *step: seen.append(step),
    )
    assert [number for number, _, _ in seen] == list(range(5))
    assert {name for _, _, name in seen} == {"table", "first", "second", "router", "head"}


def test_rounded_activations_are_those_of_the_op() -> None:
    from hal.ir.evaluate import evaluate
    from hal.passes.quantize.quantize import Quantize as Step

    toy = Toy(x=["batch", 64])
    toy.output(toy("MatMul", toy.x, toy.weight(64, 80)), "y")
    graph = Pipeline("t", (Step(parse_recipe("w8a8-g32,head=w8a8-g32")),)).run(toy.graph())[0]
    name = next(n for n in graph.nodes() if n.op_type == "RoundActivations").outputs[0].name
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    np.testing.assert_allclose(
        evaluate(graph, {"x": x}, [name or ""])[name], round_activations(x, 32)
    )
