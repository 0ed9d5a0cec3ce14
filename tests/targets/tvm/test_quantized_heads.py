"""Products with a quantized matrix for each head give what dequantized ones give."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("tvm")

from hal.ir import Graph
from hal.ir.evaluate import evaluate
from hal.passes.base import Pipeline
from hal.passes.quantize import Quantize, parse_recipe, parse_setting
from hal.targets import resolve
from hal.targets.tvm.backend import shaping_of
from hal.targets.tvm.direct import compile_graph
from hal.targets.tvm.legalize import legalize
from hal.targets.tvm.lowering import Shaping
from hal.targets.tvm.notes import weights_read
from hal.targets.tvm.target import tvm_target
from tests.targets.onnxruntime.support import parse

HEADS, K, N = 5, 96, 72
HOST = resolve("host").descriptor


def product(recipe: str, k: int = K) -> Graph:
    weight = np.random.default_rng(0).standard_normal((HEADS, k, N)).astype(np.float32)
    graph = parse(
        f"g (float[b, {HEADS}, t, {k}] x) => (float[b, {HEADS}, t, {N}] y) {{ y = MatMul (x, w) }}",
        w=weight,
    )
    return Pipeline("test", (Quantize(parse_recipe(recipe), {"w": parse_setting(recipe)}),)).run(
        graph
    )[0]


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (1, 70)])
@pytest.mark.parametrize("recipe", ["w4a16", "w4a8", "w8a8", "w3a16", "w4a16-asym", "w2a16"])
def test_codes_give_what_floats_give(recipe: str, shape: tuple[int, int]) -> None:
    graph = product(recipe)
    shaping = shaping_of(HOST)
    legal = legalize(graph, shaping)
    assert "QuantizedHeadMatMul" in {n.op_type for n in legal.graph}
    assert not weights_read(legal.graph).notes
    batch, tokens = shape
    given = {"x": np.random.default_rng(1).standard_normal((batch, HEADS, tokens, K), np.float32)}
    found = compile_graph(graph, tvm_target(HOST), shaping)(given)["y"]
    expected = evaluate(graph, given)["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_lanes_and_registers_of_another_chip() -> None:
    graph = product("w4a16", k=40)  # the last group is a short one
    given = {"x": np.random.default_rng(1).standard_normal((1, HEADS, 6, 40), np.float32)}
    found = compile_graph(graph, shaping=Shaping(lanes=4, registers=8))(given)["y"]
    expected = evaluate(graph, given)["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
