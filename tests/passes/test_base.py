from __future__ import annotations

import dataclasses
import json
from typing import ClassVar

import onnx_ir as ir
import pytest

from hal.errors import GraphError
from hal.ir import Graph
from hal.passes import DeadCode, Fold, Outcome, Pass, Pipeline, default_pipeline
from tests.passes.toys import Toy, ops


def a_graph() -> Graph:
    t = Toy(x=["batch", 4])
    t("Relu", t.x)
    t.output(t("Add", t.x, t("Mul", [1.0, 2.0, 3.0, 4.0], 2.0)), "y")
    return t.graph()


@dataclasses.dataclass(frozen=True)
class Breaking(Pass):
    """Break the graph."""

    name: ClassVar[str] = "breaking"

    def run(self, graph: Graph) -> Outcome:
        graph.graph.append(ir.node("Relu", []))
        return Outcome(1)


def test_a_pipeline_leaves_the_callers_graph_as_it_was():
    graph = a_graph()
    before = graph.node_count()
    result, _ = Pipeline("p", (DeadCode(), Fold())).run(graph)
    assert graph.node_count() == before
    assert ops(result) == {"Add": 1}


def test_a_report_counts_nodes_and_bytes_and_is_json():
    _, reports = Pipeline("p", (DeadCode(), Fold())).run(a_graph())
    assert [r.name for r in reports] == ["dce", "fold"]
    assert (reports[0].nodes_before, reports[0].nodes_after) == (3, 2)
    assert json.loads(json.dumps(reports[1].to_json()))["bytes_after"] == 16
    assert str(reports[0]).startswith("dce: 1 changes, 3 -> 2 nodes")


def test_progress_hears_of_every_pass_as_it_ends():
    heard = []
    Pipeline("p", (DeadCode(), Fold())).run(a_graph(), lambda report: heard.append(report.name))
    assert heard == ["dce", "fold"]


def test_a_repeated_pipeline_stops_when_nothing_changes():
    _, reports = Pipeline("p", (DeadCode(), Fold()), repeat=5).run(a_graph())
    assert len(reports) == 4


def test_a_broken_graph_names_the_pass_that_broke_it_and_the_one_before():
    with pytest.raises(GraphError, match=r"after pass 'breaking' .which followed 'dce'."):
        Pipeline("p", (DeadCode(), Breaking())).run(a_graph())


def test_pipelines_nest_print_one_pass_per_line_and_compare():
    pipeline = Pipeline("outer", (Fold(small=8), Pipeline("inner", (DeadCode(),), repeat=2)))
    assert str(pipeline) == "outer:\n  fold(small=8)\n  inner (up to 2 times):\n    dce"
    assert pipeline == Pipeline(
        "outer", (Fold(small=8), Pipeline("inner", (DeadCode(),), repeat=2))
    )
    assert [p.name for p in pipeline.passes()] == ["fold", "dce"]


def test_every_default_pass_says_what_it_preserves():
    for step in default_pipeline().passes():
        assert step.summary()
        assert "reserves" in (step.__doc__ or ""), step.name
