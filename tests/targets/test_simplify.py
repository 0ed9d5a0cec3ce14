"""What is left of inlined bodies once shapes are known."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from hal.ir.evaluate import evaluate
from hal.targets.simplify import simplify, turn_weights
from tests.passes.toys import Toy, ops


def test_what_shapes_decide_is_decided_and_what_is_said_twice_is_said_once() -> None:
    toy = Toy(x=[2, 4])
    parts = [
        toy("Mul", toy("Cast", toy("Range", 0, toy("Squeeze", toy("Shape", toy.x, start=1)), 1), to=1), toy.x)
        for _ in range(2)
    ]  # fmt: skip
    toy.output(toy("Add", *parts), "y")
    graph = toy.graph()
    x = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    right = evaluate(graph, {"x": x})["y"]
    simplify(graph)
    assert ops(graph) == {"Mul": 1, "Add": 1}
    np.testing.assert_array_equal(evaluate(graph, {"x": x})["y"], right)
    assert all(v.shape is not None and v.shape.is_static() for n in graph.graph for v in n.outputs)


def test_a_shape_that_was_stated_before_extents_were_known_is_inferred_again() -> None:
    toy = Toy(x=[2, 4])
    hidden = toy("Relu", toy.x)
    hidden.shape = ir.Shape([2, "unk__1"])
    toy.output(toy("Exp", hidden), "y")
    graph = toy.graph()
    simplify(graph)
    assert [list(n.outputs[0].shape or ()) for n in graph.graph] == [[2, 4], [2, 4]]


def test_a_transposed_weight_is_a_weight() -> None:
    toy = Toy(x=[2, 4])
    weight = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    toy.output(toy("MatMul", toy.x, toy("Transpose", weight, perm=[1, 0])), "y")
    graph = toy.graph()
    x = np.ones((2, 4), np.float32)
    right = evaluate(graph, {"x": x})["y"]
    turn_weights(graph)
    assert ops(graph) == {"MatMul": 1}
    np.testing.assert_array_equal(evaluate(graph, {"x": x})["y"], right)
