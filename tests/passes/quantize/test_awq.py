from __future__ import annotations

import numpy as np
import pytest

from hal.ir import Graph
from hal.ir.evaluate import evaluate
from hal.passes.base import Pipeline
from hal.passes.quantize import Quantize, parse_recipe
from hal.passes.quantize.calibration import Calibration
from tests.passes.toys import Toy

RNG = np.random.default_rng(11)
X = RNG.standard_normal((200, 64)).astype(np.float32)
SIZES = np.exp(1.5 * RNG.standard_normal(64)).astype(np.float32)


def model(norm: str, *, shared: bool = False) -> Graph:
    """Two products of one normalized input, some channels of which are much larger."""
    toy = Toy(x=["batch", 64])
    if norm == "Mul":
        value = toy("Mul", toy.x, SIZES)
    elif norm == "LayerNormalization":
        value = toy(norm, toy.x, SIZES, SIZES[::-1].copy() * 0.1)
    else:
        value = toy(norm, toy.x, SIZES)
    first = toy("MatMul", value, toy.weight(64, 80))
    second = toy("MatMul", value, toy.weight(64, 96))
    toy.output(toy("Relu", toy("Concat", first, second, axis=-1)), "y")
    if shared:
        toy.output(value, "normed")
    return toy.graph()


def error(graph: Graph, recipe: str) -> float:
    step = Quantize(parse_recipe(recipe + ",head=" + recipe), calibration=Calibration([{"x": X}]))
    changed = Pipeline("t", (step,)).run(graph)[0]
    fresh = {"x": RNG.standard_normal((100, 64)).astype(np.float32)}
    right, found = evaluate(graph, fresh)["y"], evaluate(changed, fresh)["y"]
    return float(np.linalg.norm(found - right) / np.linalg.norm(right))


@pytest.mark.parametrize("norm", ["RMSNormalization", "LayerNormalization", "Mul"])
def test_large_channels_are_rounded_better_where_the_input_can_be_divided(norm: str) -> None:
    graph = model(norm)
    assert error(graph, "w4a16:awq") < 0.7 * error(graph, "w4a16:rtn")


def test_an_input_that_something_else_reads_stays_as_it_is() -> None:
    graph = model("RMSNormalization", shared=True)
    step = Quantize(parse_recipe("w4a16:awq"), calibration=Calibration([{"x": X}]))
    changed = Pipeline("t", (step,)).run(graph)[0]
    np.testing.assert_allclose(
        evaluate(changed, {"x": X})["normed"], evaluate(graph, {"x": X})["normed"], 1e-4, 1e-4
    )
