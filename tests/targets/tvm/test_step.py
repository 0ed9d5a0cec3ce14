"""One token of one row of a language model has code of its own, with static shapes."""

from __future__ import annotations

import pytest

pytest.importorskip("tvm")

import onnx_ir as ir

from hal.ir import OPSET, Graph
from hal.ir.cache_plan import PLAN_KEY, CacheGroup, CachePlan
from hal.targets.tvm.lower import STEP, lower, step_dims
from hal.targets.tvm.lowering import Shaping


def _graph(plan: bool) -> Graph:
    def value(name: str, dims: list[str | int], dtype: ir.DataType) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(dtype))

    ids = value("ids", ["batch", "sequence"], ir.DataType.FLOAT)
    table = value("hal.table.all", ["batch", "blocks"], ir.DataType.INT32)
    node = ir.node("Exp", [ids])
    node.outputs[0].name, node.outputs[0].type = "y", ids.type
    node.outputs[0].shape = ids.shape
    graph = ir.Graph(
        [ids, table], node.outputs, nodes=[node], opset_imports={"": OPSET}, name="step"
    )
    group = CacheGroup("all", 0, "hal.past", "hal.table.all")
    data = CachePlan("contiguous", 0, True, (group,), ()).to_json()
    return Graph(ir.Model(graph, ir_version=11), (), {PLAN_KEY: data} if plan else {})


def test_tokens_and_rows_are_one_in_a_step_but_blocks_of_the_cache_are_not() -> None:
    assert step_dims(_graph(plan=True)) == {"batch", "sequence"}
    assert step_dims(_graph(plan=False)) == frozenset()


def test_the_step_is_a_second_function_and_says_when_it_applies() -> None:
    lowered = lower(_graph(plan=True), Shaping())
    names = {v.name_hint for v, _ in lowered.module.functions_items()}
    assert {"main", STEP} <= names
    assert lowered.single == (("ids", 0), ("ids", 1), ("hal.table.all", 0))
    assert not lower(_graph(plan=False), Shaping()).single
