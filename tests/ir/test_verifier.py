"""hal.ir.verify: every rule of the IR bites."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from hal.errors import GraphError, UnsupportedError
from hal.ir import verify
from tests.graphs import accumulator, graph_of, mlp, value


def test_good_graphs_pass() -> None:
    verify(mlp())
    verify(accumulator())


def test_another_operator_set_is_refused() -> None:
    graph = mlp()
    graph.graph.opset_imports[""] = 17
    with pytest.raises(GraphError, match="operator set 17"):
        verify(graph)


def test_an_unknown_op_is_named_with_its_node() -> None:
    graph = mlp()
    next(iter(graph.graph)).op_type = "MatMull"
    with pytest.raises(UnsupportedError, match=r"MatMull \(node 'first'\)"):
        verify(graph)


def test_use_before_definition_is_refused() -> None:
    graph = mlp()
    nodes = list(graph.graph)
    graph.graph.remove(nodes[0])
    graph.graph.append(nodes[0])
    with pytest.raises(GraphError, match=r"'relu'.*before it is defined"):
        verify(graph)


def test_unknown_attributes_and_wrong_arity_are_refused() -> None:
    graph = mlp()
    node = list(graph.graph)[1]
    node.attributes["slope"] = ir.AttrFloat32("slope", 0.1)
    with pytest.raises(GraphError, match="unknown attribute 'slope'"):
        verify(graph)
    x = value("x", [2])
    bad = ir.node("Add", [x], name="half")
    bad.outputs[0].name = "y"
    with pytest.raises(GraphError, match=r"'half' .* has 1 inputs"):
        verify(graph_of([x], [bad.outputs[0]], [bad]))


def test_missing_required_attribute_is_refused() -> None:
    graph = accumulator()
    del next(iter(graph.graph)).attributes["axis"]
    with pytest.raises(GraphError, match="lacks the attribute 'axis'"):
        verify(graph)


def test_state_must_keep_its_static_extents() -> None:
    graph = accumulator()
    graph.graph.outputs[1].shape = ir.Shape(["batch", "past + step", 5])
    with pytest.raises(GraphError, match="changes extent on axis 2"):
        verify(graph)


def test_duplicate_names_are_refused() -> None:
    graph = mlp()
    next(iter(graph.graph)).outputs[0].name = "x"
    with pytest.raises(GraphError, match="'x' is defined twice"):
        verify(graph)
