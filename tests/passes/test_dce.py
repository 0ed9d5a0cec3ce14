from __future__ import annotations

from hal.ir import Graph
from hal.ir.ops import function
from hal.passes import DeadCode, Pipeline
from tests.passes.toys import Toy, ops


def run(graph: Graph) -> Graph:
    return Pipeline("dce", (DeadCode(),)).run(graph)[0]


def test_unused_nodes_and_weights_go_and_unused_inputs_stay():
    t = Toy(x=["n"], unused=["n"])
    t("Mul", t("Relu", t.x), t.weight(1))
    t.output(t("Neg", t.x))
    result = run(t.graph())
    assert ops(result) == {"Neg": 1}
    assert not result.graph.initializers
    assert [v.name for v in result.graph.inputs] == ["x", "unused"]


def test_functions_and_opsets_that_nothing_uses_go():
    t = Toy(x=["n", 4])
    t.output(t("Relu", t.x))
    graph = t.graph()
    body = function("GroupedMatMul")
    graph.model.functions[body.identifier()] = body
    graph.model.opset_imports["hal"] = 1
    result = run(graph)
    assert dict(result.model.opset_imports) == {"": 28}
    assert not result.model.functions
