"""Ops that do nothing, and pairs of ops that undo each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import onnx_ir as ir

from hal.ir import Graph
from hal.passes._edit import (
    Editor,
    Rule,
    apply_rules,
    array,
    attribute,
    dim,
    ints,
    is_scalar,
    producer,
    rank,
    same_dims,
    scalar,
)
from hal.passes.base import Outcome, Pass


@dataclasses.dataclass(frozen=True)
class RemoveIdentities(Pass):
    """Remove ops that return their input, and merge pairs such as two transposes.

    Preserves all results bit for bit (``x + 0`` may change the sign of a zero). Needs shapes: an
    op is only a no-op where input and output shapes are known to be equal.
    """

    name: ClassVar[str] = "identity"

    def run(self, graph: Graph) -> Outcome:
        """Apply :data:`RULES` until nothing changes, at most four sweeps."""
        counts = apply_rules(graph, RULES, rounds=4)
        return Outcome(sum(counts.values()), counts)


def _bypass(edit: Editor, node: ir.Node, source: ir.Value | None) -> bool:
    """Let ``source`` stand for the node's output, unless a graph output needs the node."""
    result = node.outputs[0]
    if source is None:
        return False
    if result.is_graph_output():
        made = source.producer()
        if made is None or source.is_graph_output() or made.graph is not node.graph:
            return False
    return edit.replace(result, source)


def _identity(edit: Editor, node: ir.Node) -> bool:
    return _bypass(edit, node, node.inputs[0])


def _dropout(edit: Editor, node: ir.Node) -> bool:
    training = node.inputs[2] if len(node.inputs) > 2 else None
    if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        return False
    if training is not None and not is_scalar(training, 0.0):
        return False
    return _bypass(edit, node, node.inputs[0])


def _cast(edit: Editor, node: ir.Node) -> bool:
    source = node.inputs[0]
    if source is None or source.dtype is None or source.dtype != attribute(node, "to"):
        return False
    return _bypass(edit, node, source)


def _same_shape(edit: Editor, node: ir.Node) -> bool:
    """Reshape, Expand, Flatten and Squeeze to the shape that is there already."""
    return same_dims(node.inputs[0], node.outputs[0]) and _bypass(edit, node, node.inputs[0])


def _whole_slice(edit: Editor, node: ir.Node) -> bool:
    steps = node.inputs[4] if len(node.inputs) > 4 else None
    if steps is not None and set(ints(steps) or [0]) != {1}:
        return False
    return _same_shape(edit, node)


def _neutral(edit: Editor, node: ir.Node) -> bool:
    """``x * 1``, ``x / 1``, ``x ** 1``, ``x + 0``, ``x - 0``."""
    neutral = 0.0 if node.op_type in ("Add", "Sub") else 1.0
    sides = [(0, 1), (1, 0)] if node.op_type in ("Add", "Mul") else [(0, 1)]
    for kept, other in sides:
        source, constant = node.inputs[kept], node.inputs[other]
        if source is None or constant is None or scalar(constant) != neutral:
            continue
        known = rank(source)
        if known is None or (rank(constant) or 0) > known:
            continue
        if node.outputs[0].dtype in (None, source.dtype):
            return _bypass(edit, node, source)
    return False


def _transpose(edit: Editor, node: ir.Node) -> bool:
    """Drop an identity permutation; compose two transposes."""
    order = attribute(node, "perm")
    if order is None:
        return False
    if list(order) == sorted(order) or _moves_nothing(node, order):
        return _bypass(edit, node, node.inputs[0])
    inner = producer(node.inputs[0], "Transpose")
    first = attribute(inner, "perm") if inner is not None else None
    if inner is None or first is None:
        return False
    composed = [first[i] for i in order]
    if composed == sorted(composed):
        return _bypass(edit, node, inner.inputs[0])
    out = node.outputs[0]
    return edit.replace(out, edit.op("Transpose", [inner.inputs[0]], {"perm": composed}, like=out))


def _moves_nothing(node: ir.Node, order: Sequence[int]) -> bool:
    """Whether only axes of extent 1 change places, and the shape stays."""
    source = node.inputs[0]
    if source is None or not same_dims(source, node.outputs[0]):
        return False
    longer = [axis for axis in order if dim(source, axis) != 1]
    return longer == sorted(longer)


def _reshape_pair(edit: Editor, node: ir.Node) -> bool:
    """Only the last of two reshapes counts, if it copies no extent from the first."""
    inner, target = producer(node.inputs[0], "Reshape"), ints(node.inputs[1])
    if inner is None or target is None or 0 in target:
        return False
    out = node.outputs[0]
    return edit.replace(out, edit.op("Reshape", [inner.inputs[0], node.inputs[1]], like=out))


def _squeeze_unsqueeze(edit: Editor, node: ir.Node) -> bool:
    inner = producer(node.inputs[0], "Unsqueeze")
    if inner is None or len(node.inputs) < 2:
        return False
    size = rank(node.inputs[0])
    removed, added = ints(node.inputs[1]), ints(inner.inputs[1])
    if removed is None or added is None or size is None:
        return False
    if {a % size for a in removed} != {a % size for a in added}:
        return False
    return _bypass(edit, node, inner.inputs[0])


def _single_concat(edit: Editor, node: ir.Node) -> bool:
    """A concatenation of one tensor, or with empty ones."""
    if len(node.inputs) == 1:
        return _bypass(edit, node, node.inputs[0])
    full = [v for v in node.inputs if not _is_empty(v)]
    if len(full) == len(node.inputs) or not full:
        return False
    if any(rank(v) != rank(full[0]) for v in node.inputs):
        return False
    out = node.outputs[0]
    axis = {"axis": attribute(node, "axis")}
    return edit.replace(out, edit.op("Concat", full, axis, like=out))


def _is_empty(value: ir.Value | None) -> bool:
    found = array(value)
    shape = value.shape if value is not None else None
    return (found is not None and not found.size) or (shape is not None and 0 in list(shape))


def _whole_split(edit: Editor, node: ir.Node) -> bool:
    """A split of which one part is everything; empty parts stay for who reads them."""
    for value in node.outputs:
        if value.uses() and same_dims(node.inputs[0], value):
            source, result = node.inputs[0], value
            if source is None or result.is_graph_output():
                return False
            return edit.replace(result, source)
    return False


RULES: tuple[Rule, ...] = (
    Rule("identity", ("Identity",), _identity),
    Rule("dropout", ("Dropout",), _dropout),
    Rule("cast to the same type", ("Cast",), _cast),
    Rule("reshape pair", ("Reshape",), _reshape_pair),
    Rule("reshape to the same shape", ("Reshape", "Expand", "Flatten", "Squeeze"), _same_shape),
    Rule("slice of everything", ("Slice",), _whole_slice),
    Rule("neutral operand", ("Add", "Sub", "Mul", "Div", "Pow"), _neutral),
    Rule("transpose", ("Transpose",), _transpose),
    Rule("squeeze of unsqueeze", ("Squeeze",), _squeeze_unsqueeze),
    Rule("trivial concatenation", ("Concat",), _single_concat),
    Rule("split of everything", ("Split",), _whole_split),
)
