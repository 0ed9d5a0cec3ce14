"""Products with a quantized matrix for each head run on the kernels of quantized weights."""

from __future__ import annotations

import numpy as np
import pytest

from hal.ir.evaluate import evaluate
from hal.passes.base import Pipeline
from hal.passes.quantize import Quantize, parse_recipe, parse_setting
from hal.targets.onnxruntime.legalize import legalize
from tests.targets.onnxruntime.support import parse

HEADS, K, N = 3, 96, 64


@pytest.mark.parametrize("recipe", ["w4a16", "w4a8", "w8a8", "w3a16", "w4a16-asym", "mxfp4"])
def test_each_head_has_its_product(recipe: str) -> None:
    weight = np.random.default_rng(0).standard_normal((HEADS, K, N)).astype(np.float32)
    graph = parse(
        f"g (float[b, {HEADS}, t, {K}] x) => (float[b, {HEADS}, t, {N}] y) {{ y = MatMul (x, w) }}",
        w=weight,
    )
    graph = Pipeline("test", (Quantize(parse_recipe(recipe), {"w": parse_setting(recipe)}),)).run(
        graph
    )[0]
    given = {"x": np.random.default_rng(1).standard_normal((2, HEADS, 4, K), np.float32)}
    expected = evaluate(graph, given)["y"]
    legal = legalize(graph)
    kinds = [node.op_type for node in legal.graph]
    assert "DequantizeLinear" not in kinds
    assert kinds.count("MatMulNBits") % HEADS == 0
    assert kinds.count("MatMulNBits") >= HEADS
    found = evaluate(legal, given)["y"]
    size = np.abs(expected).max()
    close = 2e-2 if recipe.endswith("a8") else 1e-5  # the runtime's kernel rounds by itself
    np.testing.assert_allclose(found, expected, atol=close * size)
