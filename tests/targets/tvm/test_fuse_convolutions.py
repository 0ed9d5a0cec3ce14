"""Convolutions with what follows them become one op, whose results are those of the graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("tvm")

from hal.ir import Graph
from hal.ir.evaluate import evaluate
from hal.ir.inline import infer_types
from hal.targets.tvm.direct import compile_model
from hal.targets.tvm.fuse_convolutions import fuse_convolutions
from hal.targets.tvm.lowering import Shaping
from hal.targets.tvm.own_ops import CONVOLUTION
from tests.passes.toys import Toy

SHAPING = Shaping(lanes=8, registers=16, cores=2)


def ops(graph: Graph) -> list[str]:
    """Op types after the rewrite."""
    made = graph.clone()
    infer_types(made.model)
    fuse_convolutions(made, SHAPING)
    return [node.op_type for node in made.graph]


def check(toy: Toy, expected: list[str], size: tuple[int, ...] = (2, 4, 9, 17)) -> None:
    graph = toy.graph()
    assert ops(graph) == expected
    x = np.random.default_rng(3).standard_normal(size).astype(np.float32)
    inputs = {graph.graph.inputs[0].name: x}
    got = compile_model(ir.to_proto(graph.model))(inputs)
    for name, value in evaluate(graph, inputs).items():
        np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-4)


def conv(toy: Toy, x: Any, outputs: int, *window: int, depth: int = 4, **attributes: Any) -> Any:
    return toy("Conv", x, toy.weight(outputs, depth, *window), toy.weight(outputs), **attributes)


@pytest.mark.parametrize(
    "attributes",
    [
        {"pads": [1, 1, 1, 1]},
        {"strides": [2, 2], "pads": [0, 1, 2, 0]},
        {"auto_pad": "SAME_UPPER", "strides": [2, 3]},
        {"auto_pad": "SAME_LOWER", "dilations": [2, 1]},
        {"auto_pad": "VALID", "pads": [0, 0, 0, 0]},
    ],
)
def test_windows_are_where_onnx_puts_them(attributes: dict[str, Any]) -> None:
    toy = Toy(x=["batch", 4, 9, 17])
    toy.output(conv(toy, toy.x, 6, 3, 2, **attributes), "y")
    check(toy, [CONVOLUTION])


def test_one_axis_is_a_map_of_one_row() -> None:
    toy = Toy(x=["batch", 4, 40])
    toy.output(conv(toy, toy.x, 6, 5, pads=[2, 2], strides=[2]), "y")
    check(toy, [CONVOLUTION], (2, 4, 40))


def test_groups_and_no_bias() -> None:
    toy = Toy(x=["batch", 4, 9, 17])
    each = toy("Conv", toy.x, toy.weight(8, 1, 3, 3), group=4, pads=[1, 1, 1, 1])
    toy.output(each, "y")
    check(toy, [CONVOLUTION])


def test_a_residual_and_limits_are_taken_along() -> None:
    toy = Toy(x=["batch", 4, 9, 17])
    first = toy("Relu", conv(toy, toy.x, 4, 3, 3, pads=[1, 1, 1, 1]))
    second = conv(toy, first, 4, 3, 3, pads=[1, 1, 1, 1])
    toy.output(toy("Clip", toy("Add", toy.x, second), np.float32(0), np.float32(6)), "y")
    check(toy, [CONVOLUTION, CONVOLUTION])


def test_of_two_convolutions_that_are_added_one_takes_the_sum() -> None:
    toy = Toy(x=["batch", 4, 9, 17])
    first, second = conv(toy, toy.x, 4, 1, 1), conv(toy, toy.x, 4, 3, 3, pads=[1, 1, 1, 1])
    toy.output(toy("Relu", toy("Add", first, second)), "y")
    check(toy, [CONVOLUTION, CONVOLUTION])


def test_what_others_read_or_is_broadcast_stays() -> None:
    toy = Toy(x=["batch", 4, 9, 17])
    shared = conv(toy, toy.x, 4, 1, 1)
    toy.output(toy("Relu", shared), "y")
    toy.output(toy("Neg", shared), "z")
    check(toy, [CONVOLUTION, "Relu", "Neg"])
    toy = Toy(x=["batch", 4, 9, 17])
    toy.output(toy("Add", conv(toy, toy.x, 4, 1, 1), toy.weight(4, 1, 1)), "y")
    check(toy, [CONVOLUTION, "Add"])
    toy = Toy(x=["batch", 4, 9, 17])
    twice = conv(toy, toy.x, 4, 1, 1)
    toy.output(toy("Add", twice, twice), "y")
    check(toy, [CONVOLUTION, "Add"])


def test_unknown_sizes_three_axes_and_computed_weights_have_no_kernel() -> None:
    toy = Toy(x=["batch", 4, "height", 17])
    toy.output(conv(toy, toy.x, 4, 1, 1), "y")
    check(toy, ["Conv"])
    toy = Toy(x=["batch", 4, 3, 5, 6])
    toy.output(conv(toy, toy.x, 4, 1, 1, 1), "y")
    check(toy, ["Conv"], (2, 4, 3, 5, 6))
    toy = Toy(x=["batch", 4, 9, 17])
    toy.output(toy("Conv", toy.x, toy("Neg", toy.weight(4, 4, 1, 1))), "y")
    assert ops(toy.graph())[-1] == "Conv"


def test_weights_that_two_convolutions_share_are_packed_for_each() -> None:
    toy = Toy(x=["batch", 4, 9, 17])
    weights = toy.weight(4, 4, 3, 3)
    first = toy("Conv", toy.x, weights, pads=[1, 1, 1, 1])
    toy.output(toy("Conv", first, weights, strides=[2, 2]), "y")
    check(toy, [CONVOLUTION, CONVOLUTION])


@pytest.mark.parametrize(
    ("scale", "zero", "attributes"),
    [
        ([6], False, {"axis": 0}),
        ([], True, {}),
        ([6, 2, 3, 3], True, {"axis": 1, "block_size": 2}),
    ],
)
def test_weights_that_are_codes_become_floats(
    scale: list[int], zero: bool, attributes: dict[str, Any]
) -> None:
    toy = Toy(x=["batch", 4, 9, 17])
    rng = np.random.default_rng(5)
    codes = rng.integers(-128, 128, (6, 4, 3, 3)).astype(np.int8)
    scales = rng.random(scale, np.float32) * 0.01 + 0.001
    zeros = [rng.integers(-9, 9, scale).astype(np.int8)] if zero else []
    weights = toy("DequantizeLinear", codes, np.float32(scales), *zeros, **attributes)
    toy.output(toy("Conv", toy.x, weights, toy.weight(6), pads=[1, 1, 1, 1]), "y")
    check(toy, [CONVOLUTION])


def test_the_neutral_graph_is_not_changed() -> None:
    toy = Toy(x=["batch", 4, 9, 17])
    toy.output(toy("Relu", conv(toy, toy.x, 4, 1, 1)), "y")
    graph = toy.graph()
    ops(graph)
    assert [n.op_type for n in graph.graph] == ["Conv", "Relu"]
    assert ir.DataType.FLOAT is graph.graph.outputs[0].dtype
