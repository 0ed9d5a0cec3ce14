"""Fusion to ``Attention``."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from hal.ir import Graph
from hal.passes._edit import (
    Editor,
    Rule,
    apply_rules,
    attribute,
    copy_type,
    dim,
    ints,
    operand_orders,
    producer,
    rank,
    same_extents,
    scalar,
    single_use,
    skip,
)
from hal.passes._forms import scaled
from hal.passes.base import Outcome, Pass

MASKED = -1e4
"""Scores filled with this or less count as masked: ``exp`` of it is zero in every dtype."""


@dataclasses.dataclass(frozen=True)
class FuseAttention(Pass):
    """Fuse scaled dot-product attention into ``Attention`` on ``[batch, heads, position, dim]``.

    Scale, soft cap and mask (additive, boolean, filled) become the op's own; heads that were
    repeated for grouped queries are taken un-repeated; keys and values that are a concatenation
    of a past input and new ones are given as past and new. Preserves results up to rounding, except
    in rows in which a finite fill masks every position: those were an average of all values and
    become zero.
    """

    name: ClassVar[str] = "attention"

    def run(self, graph: Graph) -> Outcome:
        """Fuse, then simplify what goes into each ``Attention``."""
        counts = apply_rules(graph, FUSIONS)
        for name, count in apply_rules(graph, RULES, rounds=6).items():
            counts[name] = counts.get(name, 0) + count
        return Outcome(sum(counts.values()), counts)


@dataclasses.dataclass
class _Scores:
    """What the softmax normalizes: ``cap(scale * q @ k.T) + mask``."""

    q: ir.Value
    k_transposed: ir.Value
    scale: float = 1.0
    softcap: float = 0.0
    mask: ir.Value | None = None


def _attention(edit: Editor, node: ir.Node) -> bool:
    size = rank(node.outputs[0])
    if size not in (3, 4) or attribute(node, "axis", -1) % size != size - 1:
        return False
    product = _weighted_values(node.outputs[0])
    scores = _scores(edit, skip(node.inputs[0], "Cast"))
    if product is None or scores is None or product.inputs[1] is None:
        return False
    v = product.inputs[1]
    edit.at(product)
    k = _untransposed(edit, scores.k_transposed)
    k, factor = scaled(k)
    scores.scale *= factor
    inputs = [scores.q, k, v]
    if any(rank(x) != size for x in inputs) or not _fits(scores.q, k, v):
        return False
    attributes: dict[str, float] = {"scale": scores.scale}
    if scores.softcap:
        attributes["softcap"] = scores.softcap
    out = product.outputs[0]
    inputs_all: list[ir.Value | None] = [*inputs]
    if scores.mask is not None:
        inputs_all.append(scores.mask)
    if size == 4:
        return edit.replace(out, edit.op("Attention", inputs_all, attributes, like=out))
    return _as_heads_of_one(edit, out, inputs_all, attributes)


def _as_heads_of_one(
    edit: Editor, out: ir.Value, inputs: list[ir.Value | None], attributes: dict[str, float]
) -> bool:
    """Batch and heads in one axis: attention over one sequence with that many heads."""
    axis = edit.constant([0], "axes", np.int64)

    def lifted(value: ir.Value | None) -> ir.Value | None:
        if value is None or rank(value) != 3:
            return value
        made = edit.op("Unsqueeze", [value, axis])
        made.type = value.type
        made.shape = ir.Shape([1, *(value.shape or ())])
        return made

    fused = edit.op("Attention", [lifted(v) for v in inputs], attributes)
    fused.type = out.type
    fused.shape = ir.Shape([1, *out.shape]) if out.shape is not None else None
    return edit.replace(out, edit.op("Squeeze", [fused, axis], like=out))


def _weighted_values(weights: ir.Value) -> ir.Node | None:
    """The product of the softmax and the values, past casts, dropout and a guard against NaN."""
    while True:
        if weights.is_graph_output():
            return None
        users = {usage.node for usage in weights.uses()}
        guard = next((u for u in users if u.op_type == "Where"), None)
        if guard is not None and _is_nan_guard(guard, weights):
            users = {guard}
        if len(users) != 1:
            return None
        user = users.pop()
        if user.domain not in ("", "ai.onnx"):
            return None
        if user.op_type == "MatMul":
            return user if user.inputs[0] is weights and user.inputs[1] is not weights else None
        if user is not guard and user.op_type not in ("Cast", "Identity"):
            return None
        weights = user.outputs[0]


def _is_nan_guard(where: ir.Node, weights: ir.Value) -> bool:
    """``where(isnan(p), 0, p)``: rows that attend to nothing give zero, as in the op."""
    test = producer(where.inputs[0], "IsNaN")
    users = {usage.node for usage in weights.uses()}
    return (
        test is not None
        and test.inputs[0] is weights
        and scalar(where.inputs[1]) == 0.0
        and where.inputs[2] is weights
        and users == {test, where}
    )


def _scores(edit: Editor, value: ir.Value | None) -> _Scores | None:
    """Read the softmax's input from the outside in: mask, soft cap, scale, product."""
    if value is None:
        return None
    plain = _unmasked(value)
    if plain is not None:
        return plain
    node = producer(value, "Add", "Where")
    if node is None:
        return None
    if node.op_type == "Add":
        for inner, mask in operand_orders(node):
            found = _scores(edit, inner) if _masks(mask, inner) else None
            if found is not None:
                return _with_mask(edit, found, node, mask)
        return None
    return _filled(edit, node, value)


def _filled(edit: Editor, node: ir.Node, value: ir.Value) -> _Scores | None:
    """``where(keep, scores, -inf)`` or ``where(drop, -inf, scores)``."""
    condition = node.inputs[0]
    for scores, fill, keep in ((1, 2, True), (2, 1, False)):
        inner, number = node.inputs[scores], scalar(node.inputs[fill])
        if number is None or number > MASKED or not _masks(condition, inner):
            continue
        assert inner is not None
        found = _scores(edit, inner)
        if found is None or found.mask is not None:
            return None
        edit.at(node)
        if not keep:
            kept = edit.op("Not", [condition])
            assert condition is not None
            copy_type(condition, kept)
            condition = kept
        return dataclasses.replace(found, mask=condition)
    return None


def _with_mask(edit: Editor, found: _Scores, node: ir.Node, mask: ir.Value) -> _Scores | None:
    if found.mask is None:
        return dataclasses.replace(found, mask=mask)
    if found.mask.dtype != mask.dtype:
        return None
    edit.at(node)
    both = edit.op("Add", [found.mask, mask])
    both.type = mask.type
    return dataclasses.replace(found, mask=both)


def _masks(mask: ir.Value | None, scores: ir.Value | None) -> bool:
    """True when ``mask`` broadcasts to the scores and not the other way round.

    The last two axes may differ in name: the product with the values, and the output's rows, hold
    only if they are equal at run time.
    """
    if mask is None or scores is None or mask.shape is None or scores.shape is None:
        return False
    size, given = len(scores.shape), list(mask.shape)
    if not given or len(given) > size:  # a scalar is no mask
        return False
    for axis, extent in enumerate(given, size - len(given)):
        if extent == 1 or same_extents([extent], [scores.shape[axis]]):
            continue
        both_static = isinstance(extent, int) and isinstance(scores.shape[axis], int)
        if axis < size - 2 or both_static:
            return False
    return True


def _unmasked(value: ir.Value) -> _Scores | None:
    """``scale * q @ k.T``, soft-capped or not."""
    base, factor = scaled(value)
    tanh = producer(base, "Tanh")
    cap = 0.0
    if tanh is not None and tanh.inputs[0] is not None and factor > 0:
        cap = factor
        base, factor = scaled(tanh.inputs[0])
        factor *= cap
    product = producer(skip(base, "Cast"), "MatMul")
    if product is None or product.inputs[0] is None or product.inputs[1] is None:
        return None
    if not single_use(product.outputs[0]) or product.inputs[0].dtype != _dtype(product):
        return None
    q, q_factor = scaled(product.inputs[0])
    k_transposed, k_factor = scaled(product.inputs[1])
    return _Scores(q, k_transposed, factor * q_factor * k_factor, cap)


def _dtype(node: ir.Node) -> ir.DataType | None:
    return node.outputs[0].dtype


def _untransposed(edit: Editor, k_transposed: ir.Value) -> ir.Value:
    """Keys with the dim last, without a transpose if the graph had one to make them."""
    transpose, size = producer(k_transposed, "Transpose"), rank(k_transposed) or 0
    order = [*range(size - 2), size - 1, size - 2]
    source = k_transposed
    if transpose is not None and transpose.inputs[0] is not None:
        source = transpose.inputs[0]
        first = attribute(transpose, "perm") or tuple(reversed(range(size)))
        order = [first[i] for i in order]
    if order == sorted(order):
        return source
    made = edit.op("Transpose", [source], {"perm": order})
    made.type = source.type
    if source.shape is not None:
        made.shape = ir.Shape([source.shape[i] for i in order])
    return made


def _fits(q: ir.Value, k: ir.Value, v: ir.Value) -> bool:
    """The op broadcasts neither batch nor heads, except query heads over key-value heads."""
    if q.shape is None or k.shape is None or v.shape is None:
        return False
    heads = 1 if len(q.shape) == 4 else 0
    if heads and not (
        same_extents(q.shape[:1], k.shape[:1]) and same_extents(k.shape[:1], v.shape[:1])
    ):
        return False
    if not same_extents([k.shape[heads]], [v.shape[heads]]):
        return False
    query, key = dim(q, heads), dim(k, heads)
    if query is None or key is None:
        return same_extents([q.shape[heads]], [k.shape[heads]])
    return query % key == 0


# --- simplifications of Attention nodes --------------------------------------------------------


def _repeated_heads(edit: Editor, node: ir.Node) -> bool:
    """Grouped queries: give the op the heads before they were repeated."""
    k, v = _before_repeat(edit, node.inputs[1]), _before_repeat(edit, node.inputs[2])
    if k is None or v is None or len(node.inputs) > 4 or dim(k, 1) != dim(v, 1):
        return False
    if rank(node.inputs[0]) != 4 or dim(k, 1) is None:
        return False
    node.replace_input_with(1, k)
    node.replace_input_with(2, v)
    return True


def _before_repeat(edit: Editor, value: ir.Value | None) -> ir.Value | None:
    """``[b, kv, t, d]`` from ``[b, kv * n, t, d]`` whose heads are each repeated ``n`` times."""
    if value is None or value.shape is None or len(value.shape) != 4:
        return None
    direct = producer(value, "Expand")
    if direct is not None:
        source = direct.inputs[0]
        one = rank(source) == 4 and dim(source, 1) == 1 and dim(value, 1) is not None
        return source if one and _same_but(source, value, 1) else None
    reshape = producer(value, "Reshape")
    repeat = producer(reshape.inputs[0], "Expand", "Tile", "Concat") if reshape else None
    if repeat is None or repeat.inputs[0] is None:
        return None
    source, repeated = repeat.inputs[0], repeat.outputs[0]
    if repeat.op_type == "Concat":
        same = all(v is source for v in repeat.inputs)
        if not same or attribute(repeat, "axis", 0) % 5 != 2:
            return None
    heads, times = dim(repeated, 1), dim(repeated, 2)
    if rank(source) != 5 or rank(repeated) != 5 or dim(source, 2) != 1:
        return None
    if heads is None or times is None or dim(value, 1) != heads * times:
        return None
    assert source.shape is not None
    if not _same_but(source, repeated, 2):
        return None
    kept, given = [value.shape[i] for i in (0, 2, 3)], [source.shape[i] for i in (0, 3, 4)]
    if not same_extents(kept, given):
        return None
    return _without_axis(edit, source)


def _without_axis(edit: Editor, value: ir.Value) -> ir.Value:
    """Drop axis 2 of ``[b, kv, 1, t, d]``."""
    inner = producer(value, "Unsqueeze")
    if inner is not None and inner.inputs[0] is not None and ints(inner.inputs[1]) in ([2], [-3]):
        return inner.inputs[0]
    made = edit.op("Squeeze", [value, edit.constant([2], "axes", np.int64)])
    made.type = value.type
    if value.shape is not None:
        made.shape = ir.Shape([d for i, d in enumerate(value.shape) if i != 2])
    return made


def _same_but(first: ir.Value | None, second: ir.Value, axis: int) -> bool:
    if first is None or first.shape is None or second.shape is None:
        return False
    pairs = zip(first.shape, second.shape, strict=True)
    return all(
        a == b and (isinstance(a, int) or a.value is not None)
        for i, (a, b) in enumerate(pairs)
        if i != axis
    )


def _past(edit: Editor, node: ir.Node) -> bool:
    """Keys and values appended to a graph input become the op's past and present."""
    if len(node.inputs) > 4 or len(node.outputs) > 1 or rank(node.inputs[0]) != 4:
        return False
    key, value = _appended(node, 1), _appended(node, 2)
    if key is None or value is None:
        return False
    q, new = node.inputs[0], key.inputs[1]
    if q is None or q.shape is None or new is None or new.shape is None:
        return False
    if not same_extents([q.shape[2]], [new.shape[2]]):
        return False
    attributes = {k: a.value for k, a in node.attributes.items()}
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    inputs = [q, new, value.inputs[1], mask, key.inputs[0], value.inputs[0]]
    fused = edit.op("Attention", inputs, attributes, like=node.outputs[0], outputs=3)
    made = fused.producer()
    assert made is not None
    made.metadata_props.update(node.metadata_props)
    for old, present in ((key, made.outputs[1]), (value, made.outputs[2])):
        copy_type(old.outputs[0], present)
        # the attention node being replaced still reads the old value; it dies with it
        edit.replace(old.outputs[0], present)
    return edit.replace(node.outputs[0], fused)


def _appended(node: ir.Node, index: int) -> ir.Node | None:
    """The concatenation of a graph input and new positions that only this attention reads."""
    source = node.inputs[index]
    concat = producer(source, "Concat")
    if concat is None or source is None or len(concat.inputs) != 2:
        return None
    past = concat.inputs[0]
    if attribute(concat, "axis", 0) % 4 != 2 or past is None or not past.is_graph_input():
        return None
    return concat if all(usage.node is node for usage in source.uses()) else None


def _mask_batch(_edit: Editor, node: ir.Node) -> bool:
    """The op broadcasts the mask itself: expansion over batch and heads is not needed."""
    expand = producer(node.inputs[3], "Expand") if len(node.inputs) > 3 else None
    if expand is None or expand.inputs[0] is None:
        return False
    inner, outer = expand.inputs[0], expand.outputs[0]
    if inner.shape is None or outer.shape is None or len(inner.shape) < 2:
        return False
    if not same_extents(inner.shape[-2:], outer.shape[-2:]):
        return False
    node.replace_input_with(3, inner)
    return True


def _scale_in_full(_edit: Editor, node: ir.Node) -> bool:
    """State the scale, so that nobody has to know the default; drop attributes at their default."""
    changed = False
    size = dim(node.inputs[0], -1)
    if "scale" not in node.attributes and rank(node.inputs[0]) == 4 and size:
        node.attributes["scale"] = ir.AttrFloat32("scale", 1.0 / math.sqrt(size))
        changed = True
    for name, default in (("is_causal", 0), ("softcap", 0.0), ("qk_matmul_output_mode", 0)):
        if name in node.attributes and attribute(node, name) == default:
            node.attributes.pop(name)
            changed = True
    return changed


FUSIONS: tuple[Rule, ...] = (Rule("attention", ("Softmax",), _attention),)

RULES: tuple[Rule, ...] = (
    Rule("plain attributes", ("Attention",), _scale_in_full),
    Rule("un-repeated heads", ("Attention",), _repeated_heads),
    Rule("unexpanded mask", ("Attention",), _mask_batch),
    Rule("past and present", ("Attention",), _past),
)
