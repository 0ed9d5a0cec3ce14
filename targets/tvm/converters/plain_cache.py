"""``hal::CachedAttention`` as tensor expressions, for chips whose kernels a scheduler shapes.

Scores of all positions that the pages have room for, those that a query does not see at -inf; then
one softmax over what all pools hold, and the sum of their values by it.
"""

from __future__ import annotations

from typing import Any

from tvm import te, tirx

from hal.targets.tvm.converters.attention import guarded_softmax
from hal.targets.tvm.converters.shape import concatenated
from hal.targets.tvm.dims import Dim, Refused, product
from hal.targets.tvm.lowering import Op, Operand

_FLOAT = "float32"


class _Pages:
    """Keys and values of each row, read from their pages; attributes as in the op's definition."""

    def __init__(self, op: Op, first: int, bits: int, scales: tuple[int, int]) -> None:
        self.op, self.bits = op, bits
        self.keys, self.values, self.table, self.lengths = (
            op.input(i) for i in range(first, first + 4)
        )
        self.shared = int(op.attribute("value_size", 0))
        self.scales = [op.input(i) for i in scales] if bits else []
        self.room = op.symbols.simplify(product([self.table.shape[1], self.keys.shape[2]]))

    @property
    def pools(self) -> list[Operand]:
        """What :meth:`read` is given of keys, then of values."""
        return [self.keys, self.values, self.table, *self.scales]

    def read(self, pools: Any, i: tuple[Any, Any, Any, Any], *, values: bool) -> Any:
        """Channel ``i[3]`` of position ``i[2]`` of a row's head, in float32."""
        keys, others, table, *scales = pools
        own = values and not self.shared
        pool, operand = (others, self.values) if own else (keys, self.keys)
        row, head, position, channel = i
        page = _index(self.keys.shape[2])
        where = table(row, tirx.floordiv(position, page)).astype("int64")
        place = (where, head, tirx.floormod(position, page))
        stored = operand.shape[3]
        if not isinstance(stored, int):
            raise Refused("the channels of a pool must be known at compile time")
        if not self.bits:
            return pool(*place, channel)
        scale = scales[1 if own else 0]
        count = self.scales[1 if own else 0].shape[3]
        total = stored * 8 // self.bits
        if not isinstance(count, int):
            raise Refused("the scales of a pool must be known at compile time")
        factor = scale(*place, tirx.floordiv(channel, total // count)).astype(_FLOAT)
        if self.bits == 8:
            return pool(*place, channel).astype(_FLOAT) * factor
        byte = pool(*place, tirx.floormod(channel, stored)).astype("int32")
        high = tirx.shift_right(byte, tirx.const(4, "int32"))
        nibble = tirx.Select(channel < stored, tirx.bitwise_and(byte, 15), high)
        return (nibble - 8).astype(_FLOAT) * factor

    def scores(self, op: Op, lengths: list[Operand], seen: Any) -> Operand:
        """``[batch, heads, new, room]``, -inf unless ``seen(lengths, step, position)``."""
        q = op.input(0)
        group, channels = _group(q, self.keys), q.shape[3]
        scale, softcap = float(op.attribute("scale", 1.0)), float(op.attribute("softcap", 0.0))
        shape = [*q.shape[:3], self.room]

        def dots(query: Any, *pools: Any) -> Any:
            d = te.reduce_axis((0, channels), name="d")

            def element(n: Any, h: Any, s: Any, t: Any) -> Any:
                key = self.read(pools, (n, tirx.floordiv(h, group), t, d), values=False)
                return te.sum(query(n, h, s, d) * key, axis=d)

            return te.compute([_index(n) for n in shape], element, name="dots")

        def masked(raw: Any, *rest: Any) -> Any:
            *held, i = rest
            score = raw(*i) * tirx.const(scale, _FLOAT)
            if softcap:
                score = tirx.tanh(score / tirx.const(softcap, _FLOAT)) * tirx.const(softcap, _FLOAT)
            lowest = tirx.const(float("-inf"), _FLOAT)
            return tirx.Select(seen([n(i[0]) for n in held], i[2], i[3]), score, lowest)

        return op.compute(shape, masked, op.te(dots, q, *self.pools), *lengths)

    def weighted(self, op: Op, weights: Operand, start: Dim, size: int) -> Operand:
        """The sum of values, weighted by what begins at position ``start`` of the last axis."""
        q = op.input(0)
        group = _group(q, self.keys)

        def summed(w: Any, *pools: Any) -> Any:
            t = te.reduce_axis((0, _index(self.room)), name="t")

            def element(n: Any, h: Any, s: Any, d: Any) -> Any:
                value = self.read(pools, (n, tirx.floordiv(h, group), t, d), values=True)
                return te.sum(w(n, h, s, t + _index(start)) * value, axis=t)

            return te.compute([_index(n) for n in (*q.shape[:3], size)], element, name="summed")

        return op.te(summed, weights, *self.pools)


def plain_attention(op: Op) -> Operand:
    """``hal::CachedAttention`` on float32 queries."""
    recent, window = int(op.attribute("recent", 0)), int(op.attribute("window", 0))
    whole = _Pages(op, 1, int(op.attribute("bits", 0)), (5, 6))
    late = _Pages(op, 7, 0, (5, 6)) if recent else None

    def seen(held: Any, step: Any, position: Any) -> Any:
        now = held[0] + step
        conditions = [position <= now - recent]
        if window:
            conditions.append(position > now - window)
        return tirx.all(*conditions)

    def seen_late(held: Any, step: Any, position: Any) -> Any:
        now, place = held[0] + step, position + held[0] - held[1]
        return tirx.all(place <= now, place > now - recent)

    scores = whole.scores(op, [whole.lengths], seen)
    size = whole.shared or _channels(whole)
    if late is None:
        return whole.weighted(op, guarded_softmax(op, scores), 0, size)
    newest = late.scores(op, [whole.lengths, late.lengths], seen_late)
    weights = guarded_softmax(op, concatenated(op, [scores, newest], 3))
    old, new = whole.weighted(op, weights, 0, size), late.weighted(op, weights, whole.room, size)
    return op.compute(old.shape, lambda a, b, i: a(*i) + b(*i), old, new)


def _channels(pages: _Pages) -> int:
    stored = pages.values.shape[3]
    if not isinstance(stored, int):
        raise Refused("the channels of a pool must be known at compile time")
    return stored * 8 // pages.bits if pages.bits else stored


def _group(q: Operand, keys: Operand) -> int:
    heads, kv_heads = q.shape[1], keys.shape[1]
    if not (isinstance(heads, int) and isinstance(kv_heads, int)) or heads % kv_heads:
        raise Refused("CachedAttention needs known numbers of heads, one a multiple of the other")
    return heads // kv_heads


def _index(dim: Dim) -> Any:
    return tirx.const(dim, "int64") if isinstance(dim, int) else dim
