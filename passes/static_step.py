"""A lowered graph with carried state as one step of static shapes."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from hal.errors import UnsupportedError
from hal.ir import HAL_DOMAIN, Graph
from hal.ir.cache_ops import CACHE_WRITE, CACHED_ATTENTION
from hal.ir.cache_plan import PLAN_KEY, CachePlan, plan_of
from hal.ir.ops import ensure_functions
from hal.ir.step import STEP_KEY, Step
from hal.passes.base import Outcome, Pass
from hal.passes.cache_layout import CacheLayout
from hal.passes.fix_dims import FixDims


@dataclasses.dataclass(frozen=True)
class StaticStep(Pass):
    """Put growing state into pools of fixed capacity and give every dim its extent.

    A row has one page of the whole capacity, row ``b`` page ``b``. Preserves results for as many
    tokens and rows as ``step`` says, while they fit.
    """

    name: ClassVar[str] = "static_step"
    step: Step
    layout: str = "contiguous"
    bits: int = 0

    def run(self, graph: Graph) -> Outcome:
        """Lower, then fix.

        Raises:
            UnsupportedError: the state cannot be carried so.
        """
        if self.layout != "contiguous":
            raise UnsupportedError(
                f"a step of static shapes has one page for each row, no {self.layout} cache",
                "leave it out: --kv-cache contiguous",
            )
        outcome = CacheLayout(self.layout, self.bits).run(graph)
        plan = plan_of(graph)
        if plan is None and any(s.growth_axis is not None for s in graph.state):
            raise UnsupportedError(
                "a step of static shapes has no room for this model's cache, which goes in and out "
                "of each call by value (half precision, or attention of a form that is not known)",
                "choose a target with dynamic shapes",
            )
        if self.step.tokens > 1 and (graph.state or plan is None or not plan.ragged):
            raise UnsupportedError(
                f"steps of {self.step.tokens} tokens pad the end of a prompt, and padding would "
                "enter this model's state",
                "give it steps of one token",
            )
        FixDims(_extents(graph, plan, self.step)).run(graph)
        graph.metadata[STEP_KEY] = self.step.to_json()
        if plan is not None:
            graph.metadata[PLAN_KEY] = dataclasses.replace(plan, fixed=True).to_json()
            if not plan.bits:
                _mark_dense(graph)
        return outcome


def _extents(graph: Graph, plan: CachePlan | None, step: Step) -> dict[str, int]:
    """Extents of the dims that the inputs of the lowered graph still have."""
    carried = {s.input for s in graph.state}
    source = next(v for v in graph.graph.inputs if v.name not in carried)
    found = {
        str(dim.value): extent
        for dim, extent in zip(source.shape or (), (step.batch, step.tokens), strict=False)
        if isinstance(dim, ir.SymbolicDim)
    }
    for group in plan.groups if plan is not None else ():
        found[f"pages_{group.name}"] = step.batch
        found[f"page_{group.name}"] = step.page(group.window)
        found[f"blocks_{group.name}"] = 1
    return found


def _mark_dense(graph: Graph) -> None:
    """Say at the cache ops that a row's page is known, so that bodies look nothing up."""
    for node in graph.graph:
        if node.domain == HAL_DOMAIN and node.op_type in (CACHE_WRITE, CACHED_ATTENTION):
            node.attributes["dense"] = ir.AttrInt64("dense", 1)
    ensure_functions(graph.model)
