"""hal.ir.view: the networkx view and byte counts."""

from __future__ import annotations

import networkx as nx
import onnx_ir as ir

from hal.ir import to_networkx, used_values, value_bytes
from tests.graphs import graph_of, mlp, value


def test_view_is_a_dag_with_bytes_on_edges() -> None:
    graph = mlp(hidden=8)
    view = to_networkx(graph)
    assert nx.is_directed_acyclic_graph(view)
    weight = graph.graph.initializers["w1"]
    first = next(iter(graph.graph))
    assert view.edges[weight, first]["bytes"] == 8 * 8 * 4


def test_bytes_of_packed_dtypes_are_rounded_up() -> None:
    assert value_bytes(value("w", [3], ir.DataType.INT4)) == 2
    assert value_bytes(value("x", ["batch", 4]), dynamic=3) == 48


def test_values_captured_by_subgraphs_count_as_used() -> None:
    x, flag = value("x", [2]), value("flag", [], ir.DataType.BOOL)
    branches = []
    for name in ("then_branch", "else_branch"):
        inner = ir.node("Relu", [x])
        inner.outputs[0].name = f"{name}_y"
        body = ir.Graph([], [inner.outputs[0]], nodes=[inner], name=name)
        branches.append(ir.AttrGraph(name, body))
    node = ir.Node("", "If", [flag], branches, num_outputs=1)
    node.outputs[0].name = "y"
    graph_of([x, flag], [node.outputs[0]], [node])
    assert set(used_values(node)) == {x, flag}
