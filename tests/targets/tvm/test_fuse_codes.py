"""Convolutions and maxima between roundings become ops on codes, with the graph's results."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("tvm")

from hal.ir import Graph
from hal.ir.evaluate import evaluate
from hal.ir.inline import infer_types
from hal.targets.tvm.direct import compile_graph
from hal.targets.tvm.fuse_codes import CONVOLUTION, LARGEST, PACK, UNPACK, fuse_codes
from hal.targets.tvm.lowering import Shaping
from tests.kernels.support import chip
from tests.passes.toys import Toy


def shaping() -> Shaping:
    on = chip("host")
    if on.dot is None:
        pytest.skip("this machine has no dot product of bytes")
    return Shaping(lanes=on.lanes, registers=on.registers, cores=2, dot=on.dot)


def rounded(toy: Toy, x: Any, scale: float, zero: int = 128, dtype: Any = np.uint8) -> ir.Value:
    """Rounded to codes, and back."""
    parameters = np.float32(scale), dtype(zero)
    return toy("DequantizeLinear", toy("QuantizeLinear", x, *parameters), *parameters)


def weights(toy: Toy, *shape: int, dtype: Any = np.int8, **attributes: Any) -> ir.Value:
    """Codes with a scale for each output, dequantized."""
    rng = np.random.default_rng(sum(shape))
    codes = rng.integers(-127, 128, shape).astype(dtype)
    scales = (rng.random(shape[0], np.float32) + 0.5) / (60 * np.prod(shape[1:]))
    return toy("DequantizeLinear", codes, np.float32(scales), **({"axis": 0} | attributes))


def conv(toy: Toy, x: Any, outputs: int, window: int, depth: int = 6, **attributes: Any) -> Any:
    given = {"pads": [window // 2] * 4, **attributes}
    kernel = weights(toy, outputs, depth, window, window)
    return toy("Conv", x, kernel, toy.weight(outputs), **given)


def ops(graph: Graph) -> Counter[str]:
    """Ops after the rewrite; those between floats and codes do not count."""
    made = graph.clone()
    infer_types(made.model)
    fuse_codes(made, shaping())
    ordinary = ("QuantizeLinear", "DequantizeLinear")
    return Counter(n.op_type for n in made.graph if n.op_type not in ordinary)


def check(toy: Toy, expected: dict[str, int], step: float, **sizes: tuple[int, ...]) -> None:
    """What it becomes; results differ by one step at most, and hardly anywhere."""
    graph = toy.graph()
    assert ops(graph) == expected
    rng = np.random.default_rng(3)
    sizes = sizes or {"x": (2, 6, 9, 20)}
    inputs = {name: rng.standard_normal(size, np.float32) for name, size in sizes.items()}
    got = compile_graph(graph, chip("host").target, shaping())(inputs)
    for name, value in evaluate(graph, inputs).items():
        error = np.abs(got[name] - value)
        assert error.max() <= 1.001 * step + 1e-5
        assert (error > 1e-4).mean() < 2e-3


def test_a_convolution_between_roundings_reads_and_writes_words() -> None:
    toy = Toy(x=["batch", 6, 9, 20])
    first = toy("Relu", conv(toy, rounded(toy, toy.x, 0.05), 10, 3))
    second = toy("Clip", conv(toy, rounded(toy, first, 0.02, 0), 7, 1, 10), 0.0, 1.0)
    toy.output(rounded(toy, second, 0.01, 3), "y")
    check(toy, {PACK: 1, CONVOLUTION: 2, UNPACK: 1}, 0.01)


@pytest.mark.parametrize("middle", [True, False])
@pytest.mark.parametrize("shortcut", [True, False])
def test_a_residual_is_added_where_it_lies(middle: bool, shortcut: bool) -> None:
    toy = Toy(x=["batch", 6, 9, 20])
    x = rounded(toy, toy.x, 0.05)
    inner = conv(toy, x, 6, 3)
    inner = rounded(toy, inner, 0.04, 120) if middle else inner
    other = rounded(toy, conv(toy, x, 6, 1), 0.03, 100) if shortcut else x
    toy.output(rounded(toy, toy("Relu", toy("Add", inner, other)), 0.03, 0), "y")
    expected = {PACK: 1, CONVOLUTION: 1 + shortcut, UNPACK: 1}
    check(toy, expected, 0.04 if middle else 0.03)


def test_results_that_are_not_rounded_are_floats() -> None:
    toy = Toy(x=["batch", 6, 9, 20])
    x = rounded(toy, toy.x, 0.05)
    toy.output(toy("Relu", conv(toy, x, 7, 3)), "y")
    check(toy, {PACK: 1, CONVOLUTION: 1}, 0)
    toy = Toy(x=["batch", 6, 9, 20])
    x = rounded(toy, toy.x, 0.05)
    toy.output(toy("Add", x, rounded(toy, conv(toy, x, 6, 3), 0.04, 120)), "y")
    check(toy, {PACK: 1, CONVOLUTION: 1}, 0.04)


def test_channels_by_themselves() -> None:
    toy = Toy(x=["batch", 6, 15, 40])
    x = rounded(toy, toy.x, 0.05)
    each = toy("Clip", conv(toy, x, 6, 3, 1, group=6, strides=[2, 2]), 0.0, 6.0)
    each = toy("Relu", conv(toy, rounded(toy, each, 0.02, 0), 6, 3, 1, group=6))
    toy.output(rounded(toy, each, 0.01, 0), "y")
    check(toy, {PACK: 1, CONVOLUTION: 2, UNPACK: 1}, 0.01, x=(2, 6, 15, 40))


def test_the_largest_of_a_window_stays_in_words() -> None:
    toy = Toy(x=["batch", 6, 19, 40])
    x = rounded(toy, toy("Relu", conv(toy, rounded(toy, toy.x, 0.05), 10, 3)), 0.02, 7)
    most = toy("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    toy.output(rounded(toy, most, 0.02, 7), "y")
    check(toy, {PACK: 1, CONVOLUTION: 1, LARGEST: 1, UNPACK: 1}, 0.02, x=(2, 6, 19, 40))


def test_one_that_is_rounded_to_another_scale_does_not() -> None:
    toy = Toy(x=["batch", 6, 19, 40])
    x = rounded(toy, toy("Relu", conv(toy, rounded(toy, toy.x, 0.05), 10, 3)), 0.02, 7)
    most = toy("MaxPool", x, kernel_shape=[3, 3])
    toy.output(rounded(toy, most, 0.03, 7), "y")
    check(toy, {PACK: 1, CONVOLUTION: 1, UNPACK: 1, "MaxPool": 1}, 0.03, x=(2, 6, 19, 40))


def test_signed_codes_and_one_axis() -> None:
    toy = Toy(x=["batch", 6, 70])
    x = rounded(toy, toy.x, 0.05, -3, np.int8)
    kernel = weights(toy, 9, 6, 5)
    y = toy("Conv", x, kernel, pads=[2, 2], strides=[2])
    toy.output(rounded(toy, y, 0.01, 11, np.int8), "y")
    check(toy, {PACK: 1, CONVOLUTION: 1, UNPACK: 1}, 0.01, x=(2, 6, 70))


def test_codes_that_several_read_are_unpacked_for_the_others() -> None:
    toy = Toy(x=["batch", 6, 9, 20])
    first = toy("Relu", conv(toy, rounded(toy, toy.x, 0.05), 8, 3))
    shared = rounded(toy, first, 0.02, 0)
    toy.output(toy("Neg", shared), "z")
    toy.output(rounded(toy, conv(toy, shared, 7, 1, 8), 0.01), "y")
    check(toy, {PACK: 1, CONVOLUTION: 2, UNPACK: 2, "Neg": 1}, 0.02)


def test_what_has_no_kernel_stays() -> None:
    toy = Toy(x=["batch", 6, 9, 20])
    toy.output(rounded(toy, conv(toy, toy.x, 7, 1), 0.01), "y")  # floats in
    assert ops(toy.graph()) == {"Conv": 1}
    toy = Toy(x=["batch", 6, 9, 20])
    toy.output(conv(toy, rounded(toy, toy.x, 0.05), 8, 3, 3, group=2), "y")
    assert ops(toy.graph()) == {"Conv": 1}
    toy = Toy(x=["batch", 6, 9, 20])
    kernel = weights(toy, 7, 6, 1, 1, dtype=np.uint8)
    toy.output(toy("Conv", rounded(toy, toy.x, 0.05), kernel), "y")
    assert ops(toy.graph()) == {"Conv": 1}
    toy = Toy(x=["batch", 6, 9, 20])
    kernel = weights(toy, 6, 6, 1, 1, axis=1)
    toy.output(toy("Conv", rounded(toy, toy.x, 0.05), kernel), "y")
    assert ops(toy.graph()) == {"Conv": 1}


def test_chips_without_a_dot_product_compute_floats() -> None:
    toy = Toy(x=["batch", 6, 9, 20])
    toy.output(rounded(toy, conv(toy, rounded(toy, toy.x, 0.05), 7, 3), 0.01), "y")
    graph = toy.graph()
    infer_types(graph.model)
    fuse_codes(graph, Shaping(lanes=8, registers=16, cores=2))
    assert Counter(n.op_type for n in graph.graph)["Conv"] == 1
