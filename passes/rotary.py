"""Fusion to ``RotaryEmbedding``."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from hal.ir import Graph
from hal.passes._edit import (
    Editor,
    Rule,
    apply_rules,
    attribute,
    dim,
    operand_orders,
    producer,
    rank,
    single_use,
)
from hal.passes._rotary import cache, negated, pair, section, stacked, with_batch
from hal.passes.base import Outcome, Pass


@dataclasses.dataclass(frozen=True)
class FuseRotary(Pass):
    """Fuse rotary position embeddings into ``RotaryEmbedding``.

    Recognises the rotated-half and the interleaved form, written with a rotated copy
    (``x * cos + rotate(x) * sin``) or by parts, on the whole head or on its first dims. The caches
    become ``[batch, sequence, rotary_dim / 2]``, as the op asks. Preserves results up to rounding;
    a cosine table whose two halves are not provably equal is left alone.
    """

    name: ClassVar[str] = "rotary"

    def run(self, graph: Graph) -> Outcome:
        """Fuse embeddings, then take partial ones into the op."""
        counts = apply_rules(graph, RULES, rounds=2)
        return Outcome(sum(counts.values()), counts)


@dataclasses.dataclass(frozen=True)
class _Match:
    """``x`` is rotated with tables ``cos`` and ``sin`` that are whole or one half (``halved``)."""

    x: ir.Value
    cos: ir.Value
    sin: ir.Value
    interleaved: bool
    halved: bool


def _rotated_copy(edit: Editor, node: ir.Node) -> bool:
    """``x * cos + rotate(x) * sin``."""
    for plain, turned in operand_orders(node):
        left, right = producer(plain, "Mul"), producer(turned, "Mul")
        if left is None or right is None:
            continue
        for copy, sin in operand_orders(right):
            found = _rotation(copy)
            if found is None:
                continue
            for x, cos in operand_orders(left):
                if x is found[0]:
                    return _emit(edit, node, _Match(x, cos, sin, found[1], halved=False))
    return False


def _rotation(value: ir.Value) -> tuple[ir.Value, bool] | None:
    """``(x, interleaved)`` if ``value`` is ``(-x2, x1)``."""
    parts = stacked(value)
    if parts is None:
        return None
    first, second, interleaved = parts
    positive = negated(first)
    source = pair(second, positive) if positive is not None else None
    return (source[0], interleaved) if source is not None and source[1] == interleaved else None


def _by_parts(edit: Editor, node: ir.Node) -> bool:
    """``(x1 * cos - x2 * sin, x2 * cos + x1 * sin)``."""
    parts = stacked(node.outputs[0])
    if parts is None:
        return False
    real, imaginary = producer(parts[0], "Sub"), producer(parts[1], "Add")
    if real is None or imaginary is None:
        return False
    first, second = producer(real.inputs[0], "Mul"), producer(real.inputs[1], "Mul")
    if first is None or second is None:
        return False
    for x1, cos in operand_orders(first):
        for x2, sin in operand_orders(second):
            source = pair(x1, x2)
            if source is None or (parts[2] and not source[1]):
                continue
            if not _is_imaginary(imaginary, x1, x2, cos, sin):
                continue
            x = source[0] if source[1] == parts[2] else _evens_then_odds(edit, source[0])
            return _emit(edit, node, _Match(x, cos, sin, parts[2], halved=True))
    return False


def _evens_then_odds(edit: Editor, x: ir.Value) -> ir.Value:
    """For code that reads alternating dims and writes halves: reorder once, then rotate halves."""
    size = dim(x, -1) or 0
    order = edit.constant([*range(0, size, 2), *range(1, size, 2)], "order", np.int64)
    return edit.op("Gather", [x, order], {"axis": -1}, like=x)


def _is_imaginary(node: ir.Node, x1: ir.Value, x2: ir.Value, cos: ir.Value, sin: ir.Value) -> bool:
    wanted = [{id(x2), id(cos)}, {id(x1), id(sin)}]
    products = [producer(v, "Mul") for v in node.inputs]
    found = [{id(v) for v in p.inputs} for p in products if p is not None]
    return len(found) == 2 and (found == wanted or found[::-1] == wanted)


def _emit(edit: Editor, node: ir.Node, match: _Match) -> bool:
    x, out = match.x, node.outputs[0]
    size = dim(x, -1)
    if rank(x) != 4 or size is None or size % 2:
        return False
    cos = cache(edit, match.cos, x, match.interleaved, match.halved)
    sin = cache(edit, match.sin, x, match.interleaved, match.halved)
    if cos is None or sin is None or cos[1] != sin[1]:
        return False
    head_axis = cos[1]
    attributes = {"interleaved": int(match.interleaved)}
    if head_axis == 1:
        inputs = [x, cos[0], sin[0]]
        return edit.replace(out, edit.op("RotaryEmbedding", inputs, attributes, like=out))
    swap = {"perm": [0, 2, 1, 3]}
    heads_first = edit.op("Transpose", [x], swap)
    if x.shape is not None:
        heads_first.shape = ir.Shape([x.shape[i] for i in (0, 2, 1, 3)])
    heads_first.type = x.type
    inputs = [heads_first, cos[0], sin[0]]
    turned = edit.op("RotaryEmbedding", inputs, attributes, like=heads_first)
    return edit.replace(out, edit.op("Transpose", [turned], swap, like=out))


def _partial(edit: Editor, node: ir.Node) -> bool:
    """``concat(rotary(x[..., :n]), x[..., n:])`` rotates the first ``n`` dims of ``x``."""
    size = rank(node.outputs[0])
    if len(node.inputs) != 2 or size is None or attribute(node, "axis", 0) % size != size - 1:
        return False
    rotary = producer(node.inputs[0], "RotaryEmbedding")
    if (
        rotary is None
        or attribute(rotary, "rotary_embedding_dim", 0)
        or rank(rotary.inputs[0]) != 4
    ):
        return False
    head, tail = section(rotary.inputs[0]), section(node.inputs[1])
    if head is None or tail is None or head.source is not tail.source:
        return False
    whole = dim(head.source, -1)
    if (head.start, tail.stop) != (0, whole) or head.stop != tail.start:
        return False
    if head.step != 1 or tail.step != 1 or not single_use(rotary.outputs[0]):
        return False
    attributes = {k: a.value for k, a in rotary.attributes.items() if k != "num_heads"}
    attributes["rotary_embedding_dim"] = head.stop
    out = node.outputs[0]
    inputs = [head.source, *rotary.inputs[1:]]
    return edit.replace(out, edit.op("RotaryEmbedding", inputs, attributes, like=out))


def _cache_batch(edit: Editor, node: ir.Node) -> bool:
    """The op asks for one row of caches per sequence of the batch; exporters give one for all."""
    x = node.inputs[0]
    if x is None or x.shape is None or len(node.inputs) > 3 or dim(x, 0) == 1:
        return False
    changed = False
    for index in (1, 2):
        table = node.inputs[index]
        if table is not None and rank(table) == 3 and dim(table, 0) == 1:
            node.replace_input_with(index, with_batch(edit, table, x))
            changed = True
    return changed


RULES: tuple[Rule, ...] = (
    Rule("rotated copy", ("Add",), _rotated_copy),
    Rule("by parts", ("Concat", "Reshape"), _by_parts),
    Rule("partial", ("Concat",), _partial),
    Rule("cache batch", ("RotaryEmbedding",), _cache_batch),
)
