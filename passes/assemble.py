"""Tensors that are filled piece by piece."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from hal.ir import Graph
from hal.passes._edit import Editor, Rule, apply_rules, attribute, dim, ints, producer, rank
from hal.passes.base import Outcome, Pass


@dataclasses.dataclass(frozen=True)
class Assemble(Pass):
    """Turn writes that together fill a whole tensor into one ``Concat`` of what is written.

    Source code that allocates a tensor and assigns its slices arrives as a chain of ``ScatterND``
    on rows. Preserves results bit for bit; a chain that leaves a row unwritten, or writes one
    twice, stays.
    """

    name: ClassVar[str] = "assemble"

    def run(self, graph: Graph) -> Outcome:
        """Apply :data:`RULES`."""
        counts = apply_rules(graph, RULES, rounds=3)
        return Outcome(sum(counts.values()), counts)


def _filled(edit: Editor, node: ir.Node) -> bool:
    rows = dim(node.inputs[0], 0)
    if rows is None or any(u.node.op_type == "ScatterND" for u in node.outputs[0].uses()):
        return False
    parts: dict[int, tuple[int, ir.Value]] = {}
    step: ir.Node | None = node
    while step is not None:
        part = _written(step)
        if part is None:
            return False
        start, count, update = part
        parts[start] = (count, update)
        if sum(count for count, _ in parts.values()) >= rows:
            break
        step = producer(step.inputs[0], "ScatterND")
    expected = 0
    for start in sorted(parts):
        if start != expected:
            return False
        expected += parts[start][0]
    if expected != rows:
        return False
    out = node.outputs[0]
    pieces = [parts[start][1] for start in sorted(parts)]
    return edit.replace(out, edit.op("Concat", pieces, {"axis": 0}, like=out))


def _written(node: ir.Node) -> tuple[int, int, ir.Value] | None:
    """First row, number of rows and the rows that a ``ScatterND`` writes, if they are in order."""
    indices, update = node.inputs[1], node.inputs[2]
    written = ints(indices)
    if written is None or not written or update is None or dim(indices, -1) != 1:
        return None
    if rank(indices) != 2 or attribute(node, "reduction", "none") not in ("none", b"none"):
        return None
    if written != list(range(written[0], written[0] + len(written))) or written[0] < 0:
        return None
    return written[0], len(written), update


def _transposed_parts(edit: Editor, node: ir.Node) -> bool:
    """``transpose(concat(transpose(a), transpose(b)))`` that undo each other: concatenate as is."""
    concat, order = producer(node.inputs[0], "Concat"), attribute(node, "perm")
    if concat is None or order is None:
        return False
    sources = []
    for part in concat.inputs:
        inner = producer(part, "Transpose")
        first = attribute(inner, "perm") if inner is not None else None
        if inner is None or first is None or [first[i] for i in order] != sorted(order):
            return False
        sources.append(inner.inputs[0])
    axis = attribute(concat, "axis", 0) % len(order)
    out = node.outputs[0]
    made = edit.op("Concat", sources, {"axis": list(order).index(axis)}, like=out)
    return edit.replace(out, made)


RULES: tuple[Rule, ...] = (
    Rule("writes of all rows", ("ScatterND",), _filled),
    Rule("transposed parts", ("Transpose",), _transposed_parts),
)
