"""Dead code."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from onnx_ir.passes import common

from hal.ir import Graph
from hal.passes.base import Outcome, Pass


@dataclasses.dataclass(frozen=True)
class DeadCode(Pass):
    """Remove nodes, initializers, functions and opset imports that no output needs.

    Preserves all outputs, the inputs even where unused, and the state.
    """

    name: ClassVar[str] = "dce"

    def run(self, graph: Graph) -> Outcome:
        """Count nodes, initializers and functions removed."""
        before = _size(graph)
        common.RemoveUnusedNodesPass()(graph.model)
        common.RemoveUnusedFunctionsPass()(graph.model)  # type: ignore[no-untyped-call]
        opset = graph.model.opset_imports.get("")
        common.RemoveUnusedOpsetsPass()(graph.model)
        if opset is not None:
            graph.model.opset_imports.setdefault("", opset)
        return Outcome(before - _size(graph))


def _size(graph: Graph) -> int:
    return graph.node_count() + len(graph.graph.initializers) + len(graph.model.functions)
