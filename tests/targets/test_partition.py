"""hal.targets.partition: plans are convex, few and complete."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hal.errors import UnsupportedError
from hal.ir import Graph, verify
from hal.ir.evaluate import evaluate
from hal.targets.backend import Verdict
from hal.targets.partition import extract, moved_bytes, plan
from tests.graphs import graph_of, mlp, value


def random_graph(choices: list[int]) -> Graph:
    """A DAG of Adds on random earlier values."""
    x = value("x", [4])
    values = [x]
    nodes = []
    for index, choice in enumerate(choices):
        pair = [values[choice % len(values)], values[(choice // 7) % len(values)]]
        node = ir.node("Add", pair, name=f"n{index}")
        node.outputs[0].name = f"v{index}"
        node.outputs[0].shape, node.outputs[0].type = (
            ir.Shape([4]),
            ir.TensorType(ir.DataType.FLOAT),
        )
        values.append(node.outputs[0])
        nodes.append(node)
    return graph_of([x], [values[-1]], nodes)


@given(st.lists(st.tuples(st.integers(0, 1000), st.booleans()), min_size=1, max_size=25))
def test_segments_run_in_order_give_the_whole_graph(items: list[tuple[int, bool]]) -> None:
    graph = random_graph([c for c, _ in items])
    nodes = list(graph.graph)
    verdicts = {
        n: Verdict.yes() if mine else Verdict.no("test")
        for n, (_, mine) in zip(nodes, items, strict=True)
    }
    made = plan(graph, "a", verdicts, "b")
    assert sorted(n.name for s in made.segments for n in s.nodes) == sorted(n.name for n in nodes)
    x = np.ones(4, np.float32)
    values = {"x": x}
    for segment in made.segments:
        part = extract(graph, segment, "part")
        verify(part)
        values |= evaluate(part, {v.name: values[v.name] for v in part.graph.inputs})
    result = graph.graph.outputs[0].name
    np.testing.assert_array_equal(values[result], evaluate(graph, {"x": x})[result])


def test_one_refused_node_in_the_middle_makes_three_segments() -> None:
    graph = mlp(hidden=8)
    verdicts = {
        n: Verdict.no("no relu") if n.name == "relu" else Verdict.yes() for n in graph.graph
    }
    made = plan(graph, "chip", verdicts, "host")
    assert [s.backend for s in made.segments] == ["chip", "host", "chip"]
    assert made.summary() == "assigned 2/3 nodes to chip (66.7 %)"
    assert moved_bytes(made.segments) == 2 * 8 * 4
    refused = made.placement()["refused"]
    assert refused == [{"op": "Relu", "reason": "no relu", "count": 1, "nodes": ["relu"]}]


def test_no_fallback_lists_node_op_and_reason() -> None:
    graph = mlp(hidden=8)
    verdicts = {
        n: Verdict.no("no relu") if n.name == "relu" else Verdict.yes() for n in graph.graph
    }
    with pytest.raises(UnsupportedError, match=r"Relu \(node 'relu'\): no relu"):
        plan(graph, "chip", verdicts, None)
