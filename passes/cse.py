"""Common subexpressions and equal constants."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes import common

from hal.ir import Graph
from hal.passes._edit import remove_unused
from hal.passes.base import Outcome, Pass


@dataclasses.dataclass(frozen=True)
class CommonSubexpressions(Pass):
    """Compute once what is computed twice, and keep one copy of equal constants.

    Preserves all results bit for bit. Constants up to ``compared`` elements are compared by
    content; larger ones only when they are the very same tensor object (a tied weight).
    """

    name: ClassVar[str] = "cse"
    compared: int = 1024

    def run(self, graph: Graph) -> Outcome:
        """Merge equal initializers first, then equal nodes."""
        before = graph.node_count()
        shared = _merge_same_tensors(graph)
        common.DeduplicateInitializersPass(size_limit=self.compared)(graph.model)
        if not any(_holds_type(node) for node in graph.nodes()):
            common.CommonSubexpressionEliminationPass()(graph.model)
        remove_unused(graph)
        return Outcome(before - graph.node_count() + shared)


def _holds_type(node: ir.Node) -> bool:
    """Whether an attribute is a type (of Optional), which onnx-ir 1.1 cannot compare."""
    return any(a.type == ir.AttributeType.TYPE_PROTO for a in node.attributes.values())


def _merge_same_tensors(graph: Graph) -> int:
    kept: dict[int, str] = {}
    merged = 0
    initializers = graph.graph.initializers
    inputs, outputs = set(graph.graph.inputs), set(graph.graph.outputs)
    for name, value in list(initializers.items()):
        if value in inputs or value in outputs or value.const_value is None:
            continue
        first = kept.setdefault(id(value.const_value), name)
        if first != name:
            value.replace_all_uses_with(initializers[first])
            del initializers[name]
            merged += 1
    return merged
