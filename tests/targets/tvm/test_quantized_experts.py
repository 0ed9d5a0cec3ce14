"""A mixture of experts whose weights stay codes gives what the expanded one gives."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("tvm")

from hal.ir import Graph
from hal.ir.evaluate import evaluate
from hal.passes.base import Pipeline
from hal.passes.quantize import Quantize, parse_recipe
from hal.targets import resolve
from hal.targets.tvm.backend import shaping_of
from hal.targets.tvm.direct import compile_graph
from hal.targets.tvm.legalize import legalize
from hal.targets.tvm.lowering import Shaping
from hal.targets.tvm.notes import weights_read
from hal.targets.tvm.target import tvm_target
from tests.targets.onnxruntime.support import parse

EXPERTS, CHOICES = 6, 2


def quantized(graph: Graph, recipe: str) -> Graph:
    return Pipeline("test", (Quantize(parse_recipe(recipe)),)).run(graph)[0]


def mixture(recipe: str, activation: str = "silu", inner: int = 64) -> Graph:
    rng = np.random.default_rng(0)
    graph = parse(
        "g (float[t, 96] x, float[t, 2] w, int64[t, 2] i) => (float[t, 96] y)"
        f'{{ y = hal.MixtureOfExperts <activation = "{activation}"> (x, i, w, gate_up, down) }}',
        gate_up=rng.standard_normal((EXPERTS, 2 * inner, 96), np.float32),
        down=rng.standard_normal((EXPERTS, 96, inner), np.float32),
    )
    return quantized(graph, recipe)


def inputs(tokens: int, last: int = EXPERTS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(tokens)
    chosen = [rng.permutation(last)[:CHOICES] for _ in range(tokens)]
    return {
        "x": rng.standard_normal((tokens, 96), np.float32),
        "w": rng.random((tokens, CHOICES), np.float32),
        "i": np.array(chosen, np.int64).reshape(tokens, CHOICES),
    }


@pytest.mark.parametrize("tokens", [1, 5, 70])
@pytest.mark.parametrize(
    "recipe",
    ["w4a16", "w4a16-asym", "w8a16", "w2a16", "mxfp4", "fp8", "w4a16-g64", "w4a8", "w8a8-asym"],
)
def test_codes_give_what_floats_give(recipe: str, tokens: int) -> None:
    graph = mixture(recipe)
    legal = legalize(graph, Shaping(lanes=8, cores=2))
    assert "QuantizedMixtureOfExperts" in {n.op_type for n in legal.graph}
    assert not weights_read(legal.graph).notes
    given = inputs(tokens)
    found = compile_graph(graph, shaping=Shaping(lanes=8, cores=2))(given)["y"]
    expected = evaluate(graph, given)["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_every_activation(activation: str) -> None:
    graph, given = mixture("w4a16", activation), inputs(3)
    found = compile_graph(graph, shaping=Shaping(lanes=8))(given)["y"]
    expected = evaluate(graph, given)["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_what_a_token_reads_is_its_experts() -> None:
    legal = legalize(mixture("w4a16"), Shaping(lanes=8))
    used = [v for v in legal.graph.initializers.values() if v.uses() and v.const_value]
    packed = sum(v.const_value.nbytes for v in used if v.const_value)
    assert weights_read(legal.graph).bytes == pytest.approx(packed * CHOICES / EXPERTS, rel=0.05)


@pytest.mark.parametrize("tokens", [1, 5, 70])
@pytest.mark.parametrize("recipe", ["w4a8", "w8a8", "w4a8-asym", "w3a16"])
def test_by_the_instructions_of_the_host(recipe: str, tokens: int) -> None:
    host = resolve("host").descriptor
    graph, shaping, given = mixture(recipe), shaping_of(host), inputs(tokens)
    (fused,) = [
        n for n in legalize(graph, shaping).graph if n.op_type == "QuantizedMixtureOfExperts"
    ]
    assert fused.attributes["up_integer"].as_int() == (recipe != "w3a16" and bool(shaping.dot))
    reasons = [layer["reason"] for layer in graph.metadata["quantization"]["layers"]]
    assert reasons == ["", "its inputs are made inside of the mixture" if "a8" in recipe else ""]
    found = compile_graph(graph, tvm_target(host), shaping)(given)["y"]
    expected = evaluate(graph, given)["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
