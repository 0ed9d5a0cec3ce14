"""hal.targets.partition: plans are convex, few and complete."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hal.errors import UnsupportedError
from hal.ir import Graph, State, verify
from hal.ir.evaluate import evaluate
from hal.targets.backend import Verdict
from hal.targets.partition import cheaper_on_host, extract, moved_bytes, plan
from tests.graphs import graph_of, mlp, value
from tests.passes.toys import Toy


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


def between(*ops: str, width: int = 8, dims: tuple[int, ...] = (4,)) -> Graph:
    """A chain of which each product has weights of ``width`` columns."""
    toy = Toy(x=[*dims, width])
    stream = toy.x
    for op in ops:
        more = [toy.weight(width, width)] if op == "MatMul" else []
        stream = toy(op, stream, *more)
    toy.output(stream, "y")
    return toy.graph()


def left(graph: Graph, refused: str, move_cost: float = 1.0) -> list[str]:
    """Ops that follow the refused ones to the host, in order."""
    nodes = {n for n in graph.graph if n.op_type == refused}
    found = cheaper_on_host(graph, nodes, lambda _: True, move_cost)
    return [n.op_type for n in graph.graph if n in found]


def test_an_activation_between_two_refused_nodes_goes_with_them() -> None:
    assert left(between("Erf", "Relu", "Erf"), "Erf") == ["Relu"]
    assert left(between("Relu", "Erf", "Relu"), "Erf") == []
    # Two moves of 4 n bytes against three nodes of 2 n bytes each.
    assert left(between("Erf", "Relu", "Tanh", "Abs", "Erf"), "Erf") == []
    assert left(between("Erf", "Relu", "Tanh", "Abs", "Erf"), "Erf", 2.0) == ["Relu", "Tanh", "Abs"]


def test_weights_hold_a_node_on_the_target() -> None:
    assert left(between("Erf", "MatMul", "Erf", width=64), "Erf") == []
    assert left(between("Erf", "MatMul", "Erf", width=2, dims=(64,)), "Erf") == ["MatMul"]


@pytest.mark.parametrize(("readers", "expected"), [(1, ["Abs"]), (3, [])])
def test_a_tensor_moves_once_for_all_its_readers(readers: int, expected: list[str]) -> None:
    toy = Toy(x=[4, 8])
    start = toy("Erf", toy.x)
    for index in range(readers):
        toy.output(toy("Abs", start), f"y{index}")
    # Staying moves the start, 4 n bytes, once; leaving costs 2 n a reader.
    assert left(toy.graph(), "Erf", 2.0) == expected


def test_what_only_the_target_has_and_what_touches_state_stays() -> None:
    graph = between("Erf", "Relu", "Erf")
    nodes = list(graph.graph)
    refused = {nodes[0], nodes[2]}
    assert cheaper_on_host(graph, refused, lambda _: False, 1.0) == set()
    carried = State("s", nodes[0].outputs[0].name or "", "out", "recurrent", ("batch",), None)
    graph.state = (carried,)
    assert cheaper_on_host(graph, refused, lambda _: True, 1.0) == set()


def test_the_plan_says_what_was_left_to_the_host_and_why() -> None:
    graph = between("MatMul", "Erf", "Relu", "Erf", "MatMul", width=64)
    verdicts = {
        n: Verdict.no("no erf") if n.op_type == "Erf" else Verdict.yes() for n in graph.graph
    }
    made = plan(graph, "a", verdicts, "b", movable=lambda _: True)
    assert [len(s.nodes) for s in made.segments] == [1, 3, 1]
    placement = made.placement()
    assert {r["op"]: r["reason"].split(" to ")[0] for r in placement["refused"]} == {
        "Erf": "no erf",
        "Relu": "moving its tensors",
    }
    assert len(plan(graph, "a", verdicts, "b").segments) == 5


@given(st.lists(st.tuples(st.integers(0, 1000), st.booleans()), min_size=2, max_size=10))
def test_the_cut_is_the_best_of_all(items: list[tuple[int, bool]]) -> None:
    graph = random_graph([c for c, _ in items])
    nodes = list(graph.graph)
    refused = {n for n, (_, mine) in zip(nodes, items, strict=True) if not mine}

    def cost(host: set[ir.Node]) -> int:
        moved = {
            v
            for n in nodes
            for v in n.inputs
            if v is not None and v.producer() and (v.producer() in host) != (n in host)
        }
        touched = [[*dict.fromkeys(n.inputs), *n.outputs] for n in host - refused]
        return sum(2 * 16 for _ in moved) + sum(16 * len(values) for values in touched)

    free = [n for n in nodes if n not in refused]
    every = (set(c) for k in range(len(free) + 1) for c in itertools.combinations(free, k))
    found = cheaper_on_host(graph, refused, lambda _: True, 1.0)
    assert cost(refused | found) == min(cost(refused | extra) for extra in every)
