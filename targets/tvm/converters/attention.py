"""``Attention`` and ``RotaryEmbedding``, the ops of transformers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
from tvm import te, tirx

from hal.kernels import attention as kernels
from hal.targets.tvm.converters.elementwise import broadcast_index
from hal.targets.tvm.converters.shape import concatenated, reshaped, transposed
from hal.targets.tvm.dims import Dim, Refused, floordiv
from hal.targets.tvm.dtypes import FLOATS, STORED_AS
from hal.targets.tvm.lowering import Op, Operand


def _const(dim: Dim) -> Any:
    return tirx.const(dim, "int64") if isinstance(dim, int) else dim


def _heads(op: Op, x: Operand, count: int | None) -> Operand:
    """``[batch, sequence, heads * size]`` as ``[batch, heads, sequence, size]``."""
    if x.rank == 4:
        return x
    if not count:
        raise Refused("Attention of rank 3 needs the number of heads")
    batch, sequence, hidden = x.shape
    split = reshaped(op, x, [batch, sequence, count, floordiv(hidden, count)])
    return transposed(op, split, [0, 2, 1, 3])


def attention(op: Op) -> list[Operand | None]:
    """``Attention`` with mask, causal frontier, window, grouped heads, cache, softcap."""
    query_heads, kv_heads = op.attribute("q_num_heads"), op.attribute("kv_num_heads")
    # In bfloat16 the definition rounds after each step, which these kernels do not.
    q_in = op.require(0, FLOATS - {ir.DataType.BFLOAT16})
    q = _heads(op, q_in, query_heads)
    k = _heads(op, op.require(1, FLOATS), kv_heads)
    v = _heads(op, op.require(2, FLOATS), kv_heads)
    past_key, past_value = op.optional(4), op.optional(5)
    past: Dim = 0
    if past_key is not None and past_value is not None:
        past = past_key.shape[2]
        k = concatenated(op, [past_key, k], 2)
        v = concatenated(op, [past_value, v], 2)
    scores = _scores(op, q, k)
    mode = op.attribute("qk_matmul_output_mode", 0)
    biased = _biased(op, scores, q, k, past, softcap=op.attribute("softcap", 0.0))
    weights = guarded_softmax(op, biased)
    y = _weighted(op, weights, v, q)
    debug = None
    if op.wants(3):
        capped = scores
        if mode == 1 and op.attribute("softcap", 0.0):
            capped = op.compute(
                scores.shape, lambda s, i: _capped(s(*i), op.attribute("softcap")), scores
            )
        chosen = {0: scores, 1: capped, 2: biased, 3: weights}[mode]
        debug = op.compute(chosen.shape, lambda s, i: s(*i).astype(q.stored), chosen, dtype=q.dtype)
    if q_in.rank == 3:
        y = transposed(op, y, [0, 2, 1, 3])
        y = reshaped(op, y, [y.shape[0], y.shape[1], y.shape[2] * y.shape[3]])
    return [y, k if op.wants(1) else None, v if op.wants(2) else None, debug]


def _wide(x: Operand) -> str:
    return "float64" if x.stored == "float64" else "float32"


def _scores(op: Op, q: Operand, k: Operand) -> Operand:
    """``q @ k' * scale`` as ``[batch, query heads, query, key]`` in float32 at least."""
    size = q.shape[3]
    scale = op.attribute("scale")
    if scale is None:
        if not isinstance(size, int):
            raise Refused("Attention with a dynamic head size needs a scale")
        scale = 1.0 / math.sqrt(size)
    group = _group(q, k)
    wide = _wide(q)
    if q.stored == "float32" and isinstance(size, int) and not op.context.shaping.plain:
        lanes = op.context.shaping.lanes
        fast = kernels.scores(q.shape[1], k.shape[1], size, lanes, float(scale))
        shape = [*q.shape[:3], k.shape[2]]
        return op.context.call_kernel(fast, [q, k], [(shape, "float32")], "attention_scores")[0]

    def kernel(a: Any, b: Any) -> Any:
        d = te.reduce_axis((0, _const(size)), name="d")
        dots = te.compute(
            [_const(n) for n in (*q.shape[:3], k.shape[2])],
            lambda n, h, s, t: te.sum(
                a(n, h, s, d).astype(wide) * b(n, floordiv(h, group), t, d).astype(wide), axis=d
            ),
            name="dots",
        )
        return te.compute(dots.shape, lambda *i: dots(*i) * tirx.const(scale, wide), name="scores")

    return op.te(kernel, q, k)


def _group(q: Operand, k: Operand) -> int:
    heads, kv_heads = q.shape[1], k.shape[1]
    if not (isinstance(heads, int) and isinstance(kv_heads, int)) or heads % kv_heads:
        raise Refused("Attention needs known numbers of heads, one a multiple of the other")
    return heads // kv_heads


def _capped(score: Any, softcap: float) -> Any:
    cap = tirx.const(softcap, str(score.ty.dtype))
    return tirx.tanh(score / cap) * cap


def _biased(
    op: Op, scores: Operand, q: Operand, k: Operand, past: Dim, *, softcap: float
) -> Operand:
    """Scores after softcap, with -inf wherever a query may not look."""
    mask, lengths = op.optional(3), op.optional(6)
    causal = bool(op.attribute("is_causal", 0))
    left, right = op.attribute("left_window_size", -1), op.attribute("right_window_size", -1)
    operands = [scores] + [o for o in (mask, lengths) if o is not None]
    wide = scores.stored
    total = scores.shape[3]

    def body(s: Any, *rest: Any) -> Any:
        *extra, i = rest
        items = list(extra)
        score = _capped(s(*i), softcap) if softcap else s(*i)
        allowed = []
        masked = items.pop(0) if mask is not None else None
        length = items.pop(0)[i[0]].astype("int64") if lengths is not None else None
        if length is not None:
            allowed.append(i[3] < length)
        offset = _const(past) if length is None else length - _const(q.shape[2])
        position = i[2] + offset
        if causal:
            allowed.append(i[3] <= position)
        if left >= 0:
            allowed.append(i[3] >= position - left)
        if right >= 0:
            allowed.append(i[3] <= position + right)
        infinity = tirx.const(float("-inf"), wide)
        if masked is not None:
            score, condition = _masked(masked, mask, i, scores.shape, total, score, wide)
            allowed.extend(condition)
        return tirx.Select(tirx.all(*allowed), score, infinity) if allowed else score

    if not softcap and len(operands) == 1 and not causal and left < 0 and right < 0:
        return scores
    return op.compute(scores.shape, body, *operands)


def _masked(
    tensor: Any,
    mask: Any,
    i: Sequence[Any],
    shape: Sequence[Dim],
    total: Dim,
    score: Any,
    wide: str,
) -> tuple[Any, list[Any]]:
    """The score with a float mask added, and conditions of a bool (or short) mask."""
    last = mask.shape[-1]
    short = isinstance(last, int) and isinstance(total, int) and 1 < last < total
    out = [*shape[:3], last] if last != 1 else list(shape)
    if short:
        inside = i[3] < last
        clamped = [*i[:3], tirx.min(i[3], tirx.const(last - 1, "int64"))]
        value = broadcast_index(tensor, clamped, mask.shape, out)
        if mask.dtype is ir.DataType.BOOL:
            return score, [inside, value]
        return score + value.astype(wide), [inside]
    value = broadcast_index(tensor, i, mask.shape, out)
    if mask.dtype is ir.DataType.BOOL:
        return score, [value]
    return score + value.astype(wide), []


def guarded_softmax(op: Op, x: Operand) -> Operand:
    """Softmax over the last axis in which a row of -inf becomes zeros."""
    precision = op.attribute("softmax_precision")
    wide = x.stored
    if precision is not None and STORED_AS[ir.DataType(precision)] == "float64":
        wide = "float64"

    def kernel(tensor: Any) -> Any:
        extent = tensor.shape[3]
        k1, k2 = te.reduce_axis((0, extent), name="k1"), te.reduce_axis((0, extent), name="k2")
        zero, one = tirx.const(0.0, wide), tirx.const(1.0, wide)
        peak = te.compute(
            tensor.shape[:3], lambda *i: te.max(tensor(*i, k1).astype(wide), axis=k1), name="peak"
        )
        safe = te.compute(
            peak.shape,
            lambda *i: tirx.Select(peak(*i) < tirx.const(-3e38, wide), zero, peak(*i)),
            name="safe",
        )
        exps = te.compute(
            tensor.shape, lambda *i: tirx.exp(tensor(*i).astype(wide) - safe(*i[:3])), name="exps"
        )
        sums = te.compute(peak.shape, lambda *i: te.sum(exps(*i, k2), axis=k2), name="sums")
        return te.compute(
            tensor.shape,
            lambda *i: (exps(*i) / tirx.Select(sums(*i[:3]) == zero, one, sums(*i[:3]))).astype(
                x.stored
            ),
            name="weights",
        )

    return op.te(kernel, x)


def _weighted(op: Op, weights: Operand, v: Operand, q: Operand) -> Operand:
    """``weights @ v`` in the dtype of the query."""
    group, wide = _group(q, v), weights.stored

    def kernel(w: Any, values: Any) -> Any:
        t = te.reduce_axis((0, w.shape[3]), name="t")
        summed = te.compute(
            [*w.shape[:3], values.shape[3]],
            lambda n, h, s, d: te.sum(
                w(n, h, s, t) * values(n, floordiv(h, group), t, d).astype(wide), axis=t
            ),
            name="summed",
        )
        if wide == q.stored:
            return summed
        return te.compute(summed.shape, lambda *i: summed(*i).astype(q.stored), name="narrow")

    return op.te(kernel, weights, v, dtype=q.dtype)


def rotary_embedding(op: Op) -> Operand:
    """``RotaryEmbedding``, with or without position ids, whole or partial, interleaved or not."""
    x_in, cos, sin, positions = op.require(0, FLOATS), op.input(1), op.input(2), op.optional(3)
    heads = op.attribute("num_heads", 0)
    x = _heads(op, x_in, heads) if x_in.rank == 3 else x_in
    size, interleaved = x.shape[3], bool(op.attribute("interleaved", 0))
    rotated = op.attribute("rotary_embedding_dim", 0) or size
    if not isinstance(rotated, int):
        raise Refused("RotaryEmbedding of a dynamic head size")
    half = rotated // 2
    operands = [x, cos, sin] + ([positions] if positions is not None else [])

    def body(tensor: Any, c: Any, s: Any, *rest: Any) -> Any:
        *ids, i = rest
        n, h, t, d = i
        if interleaved:
            pair, first = tirx.floordiv(d, 2), tirx.floormod(d, 2) == 0
            other = tirx.Select(first, d + 1, d - 1)
        else:
            first = d < half
            pair = tirx.Select(first, d, d - half)
            other = tirx.Select(first, d + half, d - half)
        pair = tirx.min(pair, tirx.const(half - 1, "int64"))
        other = tirx.min(other, _const(size) - 1)
        row = [ids[0](n, t).astype("int64")] if ids else [_row(cos, n), t]
        cosine, sine = c(*row, pair), s(*row, pair)
        turned = tensor(n, h, t, d) * cosine + tirx.Select(
            first, tirx.const(-1, x.stored), tirx.const(1, x.stored)
        ) * (tensor(n, h, t, other) * sine)
        if isinstance(size, int) and size == rotated:
            return turned
        return tirx.Select(d < rotated, turned, tensor(n, h, t, d))

    def halves(tensor: Any, c: Any, s: Any, *rest: Any) -> Any:
        """The same by halves, whose neighbours are neighbours: vectors need no gathering."""
        *ids, i = rest
        n, h, t, part, d = i
        row = [ids[0](n, t).astype("int64")] if ids else [_row(cos, n), t]
        low = part == 0
        here, there = (tensor(n, h, t, p * half + d) for p in (part, 1 - part))
        sign = tirx.Select(low, tirx.const(-1, x.stored), tirx.const(1, x.stored))
        return here * c(*row, d) + sign * (there * s(*row, d))

    if size == rotated == 2 * half and not interleaved:
        split = op.compute([*x.shape[:3], 2, half], halves, *operands, dtype=x.dtype)
        y = reshaped(op, split, x.shape)
    else:
        y = op.compute(x.shape, body, *operands, dtype=x.dtype)
    if x_in.rank == 3:
        return reshaped(op, transposed(op, y, [0, 2, 1, 3]), x_in.shape)
    return y


def _row(cache: Operand, n: Any) -> Any:
    return tirx.const(0, "int64") if cache.shape[0] == 1 else n


CONVERTERS: dict[str, Callable[[Op], Any]] = {
    "Attention": attention,
    "RotaryEmbedding": rotary_embedding,
}
"""Converters of this family by op type."""
