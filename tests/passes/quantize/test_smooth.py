from __future__ import annotations

import numpy as np
import pytest

from hal.ir import Graph
from hal.ir.evaluate import evaluate
from hal.passes.base import Pipeline
from hal.passes.quantize import Quantize, parse_format, parse_recipe
from hal.passes.quantize.calibration import Calibration
from hal.passes.quantize.smooth import search_strength
from tests.passes.toys import Toy

X = np.random.default_rng(5).standard_normal((256, 64)).astype(np.float32)
FRESH = np.random.default_rng(6).standard_normal((400, 64)).astype(np.float32)
SIZES = np.ones(64, np.float32)
SIZES[::16] = 40  # outliers


def normalized() -> Graph:
    toy = Toy(x=["batch", 64])
    value = toy("RMSNormalization", toy.x, SIZES)
    first = toy("MatMul", value, toy.weight(64, 80))
    second = toy("MatMul", value, toy.weight(64, 96))
    toy.output(toy("Relu", toy("Concat", first, second, axis=-1)), "y")
    return toy.graph()


def gated(*, turned: bool, shared: bool = False) -> Graph:
    """A product that is a factor of the input of another; some of its channels are large."""
    toy = Toy(x=["batch", 64])
    up = toy.weight(64, 96)
    up.const_value.numpy()[:, ::16] *= 40
    if turned:
        up = toy.weight(96, 64)
        up.const_value.numpy()[::16] *= 40
        up = toy("Transpose", up, perm=[1, 0])
    made = toy("MatMul", toy.x, up)
    gate = toy("Sigmoid", toy("MatMul", toy.x, toy.weight(64, 96)))
    toy.output(toy("Relu", toy("MatMul", toy("Mul", gate, made), toy.weight(96, 64))), "y")
    if shared:
        toy.output(toy("Relu", made), "other")
    return toy.graph()


def quantized(graph: Graph, recipe: str) -> Graph:
    step = Quantize(parse_recipe(recipe), calibration=Calibration([{"x": X}]))
    return Pipeline("t", (step,)).run(graph)[0]


def error(graph: Graph, recipe: str) -> float:
    changed = quantized(graph, recipe)
    right, found = (evaluate(made, {"x": FRESH})["y"] for made in (graph, changed))
    return float(np.linalg.norm(found - right) / np.linalg.norm(right))


@pytest.mark.parametrize("form", ["w8a8-channel", "w8a8"])
def test_outliers_of_activations_move_into_the_weights(form: str) -> None:
    graph = normalized()
    assert error(graph, f"{form}:smooth") < 0.7 * error(graph, f"{form}:rtn")


@pytest.mark.parametrize("turned", [True, False])
def test_the_layer_before_makes_them_smaller_where_there_is_no_norm(turned: bool) -> None:
    graph = gated(turned=turned)
    assert error(graph, "w8a8-channel:smooth") < 0.7 * error(graph, "w8a8-channel:rtn")


def test_a_layer_whose_result_something_else_reads_stays_as_it_is() -> None:
    graph = gated(turned=True, shared=True)
    changed = quantized(graph, "w8a8-channel:smooth")
    fresh = {"x": X[:20]}
    right, found = evaluate(graph, fresh)["other"], evaluate(changed, fresh)["other"]
    assert np.abs(found - right).max() < 0.05 * np.abs(right).max()


def test_inputs_without_outliers_are_left_alone_or_better() -> None:
    weight = np.random.default_rng(8).standard_normal((48, 64)).astype(np.float32)
    scale = search_strength([weight], [parse_format("w8a8")], X)
    assert scale.max() / scale.min() < 3
