"""Graphs as the toolkit reads them: an older operator set, everything spelled out, the same results."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from hal.errors import UnsupportedError
from hal.ir import Graph
from hal.ir.evaluate import evaluate
from hal.targets.rknn.plain import plain
from tests.passes.toys import Toy

FLOAT = np.random.default_rng(0)


def same(graph: Graph, legal: Graph, x: np.ndarray) -> None:
    onnx.checker.check_model(ir.to_proto(legal.model))
    expected, found = evaluate(graph, {"x": x}), evaluate(legal, {"x": x})
    assert list(found) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(np.asarray(found[name]), np.asarray(value), atol=2e-6)


def ops(graph: Graph) -> list[str]:
    return [node.op_type for node in graph.graph]


def test_newer_ops_are_written_in_older_ones() -> None:
    toy = Toy(x=[2, 8])
    normal = toy("RMSNormalization", toy.x, np.ones(8, np.float32), axis=-1)
    toy.output(toy("Swish", normal), "y")
    graph = toy.graph()
    legal = plain(graph, 19)
    assert legal.model.opset_imports[""] == 19
    assert not {"RMSNormalization", "Swish", "Constant", "Shape"} & set(ops(legal))
    same(graph, legal, FLOAT.standard_normal((2, 8)).astype(np.float32))


def test_gelu_is_written_as_the_toolkit_knows_it() -> None:
    toy = Toy(x=[2, 8])
    toy.output(toy("Gelu", toy.x), "y")
    graph = toy.graph()
    legal = plain(graph, 19)
    assert ops(legal) == ["Div", "Erf", "Add", "Mul", "Mul"]
    assert ops(graph) == ["Gelu"]
    same(graph, legal, FLOAT.standard_normal((2, 8)).astype(np.float32))


def test_the_approximation_of_gelu_stays_one() -> None:
    toy = Toy(x=[2, 8])
    toy.output(toy("Gelu", toy.x, approximate="tanh"), "y")
    graph = toy.graph()
    legal = plain(graph, 19)
    assert "Tanh" in ops(legal)
    same(graph, legal, FLOAT.standard_normal((2, 8)).astype(np.float32))


def test_attributes_at_their_defaults_are_written_down() -> None:
    toy = Toy(x=[2, 8])
    ones, zeros = np.ones(8, np.float32), np.zeros(8, np.float32)
    toy.output(toy("LayerNormalization", toy.x, ones, zeros), "y")
    (node,) = plain(toy.graph(), 19).graph
    assert node.attributes["epsilon"].as_float() == pytest.approx(1e-5)
    assert node.attributes["axis"].as_int() == -1


def test_codes_stay_codes_and_get_a_zero_point_of_their_dtype() -> None:
    toy = Toy(x=[2, 4])
    codes = FLOAT.integers(-127, 127, (4, 3)).astype(np.int8)
    weight = toy("DequantizeLinear", codes, np.full(3, 0.01, np.float32), axis=1)
    toy.output(toy("MatMul", toy.x, weight), "y")
    graph = toy.graph()
    legal = plain(graph, 19)
    assert ops(legal) == ["DequantizeLinear", "MatMul"]
    zero = legal.graph[0].inputs[2]
    assert zero is not None
    assert zero.const_value is not None
    assert (zero.dtype, zero.const_value.numpy().tolist()) == (ir.DataType.INT8, [0, 0, 0])
    same(graph, legal, FLOAT.standard_normal((2, 4)).astype(np.float32))


def test_what_an_older_operator_set_cannot_say_is_told() -> None:
    toy = Toy(x=[2, 4])
    codes = FLOAT.integers(-8, 7, (4, 6)).astype(np.int8)
    scales = np.full((2, 6), 0.1, np.float32)
    weight = toy("DequantizeLinear", codes, scales, axis=0, block_size=2)
    toy.output(toy("MatMul", toy.x, weight), "y")
    with pytest.raises(UnsupportedError, match=r"operator set 19.*no attribute block_size") as told:
        plain(toy.graph(), 19)
    assert "w8a8" in told.value.hint
