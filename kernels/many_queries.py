"""Attention of many queries at once over the pages of a cache: what a prompt needs.

A task takes a block of neighbouring queries of some heads that share keys. Queries lie beside each
other in the lanes of a vector, so a key's channel is read once for all of them, scores need no sums
across lanes, and the running maximum, the exponentials and the causal limit are vectors, too:

    scores[key, query]   += key[channel] (spread) * query[channel, query]
    result[query, channel] += score (spread) * value[channel]

Per block of keys and query, both take ``channels`` multiply-adds a lane; all else is a tenth of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T  # noqa: N812

from hal.kernels.attention_plan import Attention
from hal.kernels.emitting import i64, vector
from hal.kernels.exponential import COEFFICIENTS, LN2_HIGH, LN2_LOW, LOG2E, LOWEST
from hal.kernels.vectors import span, spread, vector_lanes

BLOCK = 32
"""Keys that are scored before their values are read."""

_ROWS = 4
"""Rows of the result that share a reading of values."""

_NONE = -3e38


@dataclasses.dataclass(frozen=True)
class Operands:
    """Buffers of a kernel, of :func:`hal.kernels.cache.attention`."""

    q: Any
    keys: Any
    values: Any
    table: Any
    lengths: Any
    key_scales: Any
    value_scales: Any
    out: Any
    log_sums: Any


def heads_together(a: Attention) -> int:
    """Query heads in a task: they share a reading of keys, as far as scores of 4 keys each fit."""
    group = a.heads // a.kv_heads
    return max(n for n in range(1, 5) if group % n == 0 and (n == 1 or 4 * n + 6 <= a.registers))


def emit(a: Attention, buffers: Operands, batch: Any, new: Any, page: Any) -> None:
    """All tasks, for ``new`` queries of each row."""
    tile = heads_together(a)
    tiles = a.heads // tile
    blocks = tirx.floordiv(new + i64(a.lanes - 1), i64(a.lanes))
    with T.parallel(batch * i64(tiles) * blocks) as task:
        row = T.Bind(tirx.floordiv(task, i64(tiles) * blocks))
        first = T.Bind(tirx.floormod(tirx.floordiv(task, blocks), i64(tiles)) * i64(tile))
        # Late queries see more keys: early and late ones in turns, so that threads get as much.
        turn = T.Bind(tirx.floormod(task, blocks))
        half = tirx.floordiv(turn, i64(2))
        odd = tirx.floormod(turn, i64(2)) == i64(1)
        start = T.Bind(tirx.Select(odd, blocks - i64(1) - half, half) * i64(a.lanes))
        _Task(a, buffers, tile, row, first, start, new, page).emit()


class _Task:
    """Code for one block of queries."""

    def __init__(
        self,
        a: Attention,
        buffers: Operands,
        tile: int,
        row: Any,
        first: Any,
        start: Any,
        new: Any,
        page: Any,
    ) -> None:
        self.a, self.buffers, self.tile = a, buffers, tile
        self.row, self.first, self.start, self.new, self.page = row, first, start, new, page
        self.lanes = a.lanes
        self.kind = vector("float32", a.lanes)
        self.kv = T.Bind(tirx.floordiv(first, i64(a.heads // a.kv_heads)))
        self.count = T.Bind(tirx.min(i64(a.lanes), new - start))
        alike = a.block if a.bits else 0
        self.wide = vector_lanes(math.gcd(a.value_channels, alike), a.lanes)

        def memory(size: int) -> Any:
            return T.alloc_buffer((size,), "float32", scope="global")

        self.queries = memory(tile * a.channels * self.lanes)
        self.scores = memory(tile * BLOCK * self.lanes)
        self.sums = memory(tile * self.lanes * a.value_channels)
        self.shrink = memory(tile * self.lanes)
        self.peaks = memory(tile * self.lanes)
        self.totals = memory(tile * self.lanes)
        if a.bits:
            self.wide_keys = memory(BLOCK * a.channels)
            self.wide_values = self.wide_keys if a.shared else memory(BLOCK * a.value_channels)
        at_once = max(1, (a.registers - 6) // tile)
        self.keys_at_once = next(n for n in (8, 4, 2, 1) if n <= at_once)
        self.products = T.alloc_buffer((tile * self.keys_at_once,), self.kind, scope="local")
        vectors = a.value_channels // self.wide
        room = max(1, (a.registers - 4) // (_ROWS + 1))
        self.columns = max(n for n in range(1, min(4, room) + 1) if vectors % n == 0)
        self.parts = T.alloc_buffer(
            (_ROWS * self.columns,), vector("float32", self.wide), scope="local"
        )

    def emit(self) -> None:
        """The whole task."""
        a, page = self.a, self.page
        length = self.buffers.lengths[self.row]
        newest = T.Bind(length + self.start + self.count - i64(1 + a.lag))
        oldest = i64(0)
        if a.window:
            seen = length + self.start + i64(1 - a.window)
            oldest = T.Bind(tirx.max(seen, i64(0)))
        self._begin()
        pages = tirx.floordiv(newest, page) + i64(1)
        with T.serial(tirx.floordiv(oldest, page), pages) as n:
            at = T.Bind(tirx.Cast("int64", self.buffers.table[self.row, n]))
            # No condition in these loops: TVM 0.27 takes seconds to bound accesses below one.
            end = T.Bind(tirx.min(page, newest + i64(1) - n * page))
            begin = tirx.max(oldest - n * page, i64(0)) if a.window else i64(0)
            skipped = T.Bind(tirx.floordiv(begin, i64(BLOCK)))
            last = tirx.floordiv(end + i64(BLOCK - 1), i64(BLOCK))
            with T.serial(i64(0), last - skipped) as k:
                low = T.Bind((skipped + k) * i64(BLOCK))
                count = T.Bind(tirx.min(i64(BLOCK), end - low))
                # The first position as the first query sees it: 0 is its own.
                place = T.Bind(tirx.Cast("int32", n * page + low - length - self.start))
                self._block(at, low, count, place)
        self._finish()

    def _begin(self) -> None:
        """Queries of a head side by side, times the scale; those that there are not: the last."""
        a, lanes = self.a, self.lanes
        scale = tirx.const(a.scale, "float32")
        for g in range(self.tile):
            with T.serial(i64(0), i64(a.channels)) as c, T.serial(i64(0), i64(lanes)) as s:
                source = self.start + tirx.min(s, self.count - i64(1))
                value = self.buffers.q[self.row, self.first + i64(g), source, c]
                place = (i64(g * a.channels) + c) * i64(lanes) + s
                T.buffer_store(self.queries, value * scale, [place])
        with T.serial(i64(0), i64(self.tile)) as g:
            T.buffer_store(self.peaks, self._all(_NONE), [self._of(g)])
            T.buffer_store(self.totals, self._all(0.0), [self._of(g)])
        size = self.tile * lanes * a.value_channels // self.wide
        with T.serial(i64(0), i64(size)) as i:
            zero = spread(tirx.const(0.0, "float32"), self.wide)
            T.buffer_store(self.sums, zero, [span(i * i64(self.wide), self.wide)])

    def _all(self, value: float) -> Any:
        return spread(tirx.const(value, "float32"), self.lanes)

    def _of(self, g: Any) -> Any:
        """The queries of head ``g`` of the task."""
        return span(g * i64(self.lanes), self.lanes)

    def _score(self, g: Any, j: Any) -> Any:
        return span((g * i64(BLOCK) + j) * i64(self.lanes), self.lanes)

    # -- a block of keys --------------------------------------------------------------------------

    def _block(self, at: Any, low: Any, count: Any, place: Any) -> None:
        """``count`` keys from slot ``low`` of page ``at``."""
        a = self.a
        if a.bits:
            self._widen(self.buffers.keys, self.buffers.key_scales, self.wide_keys, a.channels,
                        at, low, count)  # fmt: skip
            if not a.shared:
                self._widen(self.buffers.values, self.buffers.value_scales, self.wide_values,
                            a.value_channels, at, low, count)  # fmt: skip
        self._multiply_keys(at, low, count)
        if a.softcap:
            self._cap(count)
        self._weigh(count, place)
        self._multiply_values(at, low, count)

    def _widen(
        self, pool: Any, scales: Any, goal: Any, channels: int, at: Any, low: Any, count: Any
    ) -> None:
        """Codes of a block as floats, ``goal[key, channel]``."""
        bits, block = self.a.bits, self.a.block
        stored = channels // 2 if bits == 4 else channels
        v = vector_lanes(math.gcd(stored, block), self.lanes)
        with T.serial(i64(0), count) as j, T.serial(i64(0), i64(stored // v)) as i:
            codes = T.Bind(pool[at, self.kv, low + j, span(i * i64(v), v)])

            def put(value: Any, channel: Any, j: Any = j) -> None:
                scale = scales[at, self.kv, low + j, tirx.floordiv(channel, i64(block))]
                wide = tirx.Cast(vector("float32", v), value)
                place = span(j * i64(channels) + channel, v)
                T.buffer_store(goal, wide * spread(tirx.Cast("float32", scale), v), [place])

            if bits == 8:
                put(codes, i * i64(v))
            else:
                whole = T.Bind(tirx.Cast(vector("int32", v), codes))
                eight = spread(tirx.const(8, "int32"), v)
                put(tirx.bitwise_and(whole, spread(tirx.const(15, "int32"), v)) - eight, i * i64(v))
                high = tirx.shift_right(whole, spread(tirx.const(4, "int32"), v))
                put(high - eight, i64(stored) + i * i64(v))

    def _multiply_keys(self, at: Any, low: Any, count: Any) -> None:
        """Scores of the block, some keys at a time; those behind the last one mean nothing."""
        a, many, tile = self.a, self.keys_at_once, self.tile
        with T.serial(i64(0), tirx.floordiv(count + i64(many - 1), i64(many))) as step:
            j = step * i64(many)
            for i in range(tile * many):
                T.buffer_store(self.products, self._all(0.0), [i])
            slots = [T.Bind(tirx.min(low + j + i64(i), self.page - i64(1))) for i in range(many)]

            def key(i: int, c: Any) -> Any:
                if a.bits:
                    return self.wide_keys[(j + i64(i)) * i64(a.channels) + c]
                return self.buffers.keys[at, self.kv, slots[i], c]

            with T.serial(i64(0), i64(a.channels)) as c:
                places = [(i64(g * a.channels) + c) * i64(self.lanes) for g in range(tile)]
                queries = [T.Bind(self.queries[span(p, self.lanes)]) for p in places]
                for i in range(many):
                    value = T.Bind(spread(key(i, c), self.lanes))
                    for g in range(tile):
                        at_ = g * many + i
                        T.buffer_store(
                            self.products, self.products[at_] + queries[g] * value, [at_]
                        )
            for g in range(tile):
                for i in range(many):
                    where = self._score(i64(g), j + i64(i))
                    T.buffer_store(self.scores, self.products[g * many + i], [where])

    def _cap(self, count: Any) -> None:
        cap = tirx.const(self.a.softcap, "float32")
        for g in range(self.tile):
            with T.serial(i64(0), count * i64(self.lanes)) as i:
                place = i64(g * BLOCK * self.lanes) + i
                value = tirx.tanh(self.scores[place] / cap) * cap
                T.buffer_store(self.scores, value, [place])

    def _weigh(self, count: Any, place: Any) -> None:
        """Exponentials in the place of scores, and what earlier sums become beside them."""
        lanes, a = self.lanes, self.a
        query = span(tirx.const(0, "int32"), lanes)

        def seen(j: Any) -> Any:
            position = T.Bind(place + tirx.Cast("int32", j))
            fits = query >= spread(position + tirx.const(a.lag, "int32"), lanes)
            if a.window:
                late = query < spread(position + tirx.const(a.window, "int32"), lanes)
                fits = tirx.And(fits, late)
            return fits

        best = T.alloc_buffer((1,), self.kind, scope="local")
        total = T.alloc_buffer((1,), self.kind, scope="local")
        with T.serial(i64(0), i64(self.tile)) as g:
            T.buffer_store(best, self.peaks[self._of(g)], [0])
            with T.serial(i64(0), count) as j:
                score = self.scores[self._score(g, j)]
                kept = T.Bind(tirx.Select(seen(j), score, self._all(_NONE)))
                T.buffer_store(best, tirx.max(best[0], kept), [0])
            top = T.Bind(best[0])
            shrink = T.Bind(self._exponential(self.peaks[self._of(g)] - top))
            T.buffer_store(self.shrink, shrink, [self._of(g)])
            T.buffer_store(self.peaks, top, [self._of(g)])
            T.buffer_store(total, self.totals[self._of(g)] * shrink, [0])
            with T.serial(i64(0), count) as j:
                raised = self._exponential(self.scores[self._score(g, j)] - top)
                weight = T.Bind(tirx.Select(seen(j), raised, self._all(0.0)))
                T.buffer_store(self.scores, weight, [self._score(g, j)])
                T.buffer_store(total, total[0] + weight, [0])
            T.buffer_store(self.totals, total[0], [self._of(g)])

    def _exponential(self, x: Any) -> Any:
        """``e**x`` for numbers that are not above 0."""
        x = T.Bind(tirx.max(x, self._all(LOWEST)))
        n = T.Bind(tirx.floor(x * self._all(LOG2E) + self._all(0.5)))
        r = T.Bind(x - n * self._all(LN2_HIGH) - n * self._all(LN2_LOW))
        value = self._all(COEFFICIENTS[0])
        for coefficient in COEFFICIENTS[1:]:
            value = value * r + self._all(coefficient)
        value = value * r * r + r + self._all(1.0)
        whole = vector("int32", self.lanes)
        exponent = tirx.Cast(whole, n) + spread(tirx.const(127, "int32"), self.lanes)
        bits = tirx.shift_left(exponent, spread(tirx.const(23, "int32"), self.lanes))
        return T.Bind(value * tirx.reinterpret(self.kind, bits))

    def _multiply_values(self, at: Any, low: Any, count: Any) -> None:
        """Add the block's values to the sums, some rows and vectors of channels at a time."""
        a, wide, columns = self.a, self.wide, self.columns
        rows = min(_ROWS, self.lanes)
        pool = self.buffers.keys if a.shared else self.buffers.values
        row_size = a.channels if a.shared else a.value_channels

        def value(j: Any, channel: Any) -> Any:
            if a.bits:
                return self.wide_values[span(j * i64(row_size) + channel, wide)]
            return pool[at, self.kv, low + j, span(channel, wide)]

        steps = a.value_channels // wide // columns
        with (
            T.serial(i64(0), i64(self.tile)) as g,
            T.serial(i64(0), i64(self.lanes // rows)) as quarter,
            T.serial(i64(0), i64(steps)) as step,
        ):
            first = T.Bind(g * i64(self.lanes) + quarter * i64(rows))
            channel = T.Bind(step * i64(columns * wide))

            def each(do: Callable[[int, Any, int], None]) -> None:
                for r in range(rows):
                    base = (first + i64(r)) * i64(a.value_channels) + channel
                    for c in range(columns):
                        do(r * columns + c, span(base + i64(c * wide), wide), r)

            def load(i: int, place: Any, r: int) -> None:
                factor = spread(self.shrink[first + i64(r)], wide)
                T.buffer_store(self.parts, self.sums[place] * factor, [i])

            each(load)
            with T.serial(i64(0), count) as j:
                numbers = [T.Bind(value(j, channel + i64(c * wide))) for c in range(columns)]
                column = (g * i64(BLOCK) + j) * i64(self.lanes) + quarter * i64(rows)
                for r in range(rows):
                    weight = T.Bind(spread(self.scores[column + i64(r)], wide))
                    for c in range(columns):
                        i = r * columns + c
                        T.buffer_store(self.parts, self.parts[i] + weight * numbers[c], [i])
            each(lambda i, place, r: T.buffer_store(self.sums, self.parts[i], [place]))

    def _finish(self) -> None:
        """Results of the queries that there are."""
        a, out, wide = self.a, self.buffers.out, self.wide
        with T.serial(i64(0), i64(self.tile)) as g, T.serial(i64(0), self.count) as s:
            total = T.Bind(self.totals[g * i64(self.lanes) + s])
            some = total > tirx.const(0.0, "float32")
            zero, one = tirx.const(0.0, "float32"), tirx.const(1.0, "float32")
            factor = T.Bind(tirx.Select(some, one / total, zero))
            head, query = self.first + g, self.start + s
            with T.serial(i64(0), i64(a.value_channels // wide)) as c:
                place = (g * i64(self.lanes) + s) * i64(a.value_channels) + c * i64(wide)
                value = self.sums[span(place, wide)] * spread(factor, wide)
                T.buffer_store(out, value, [self.row, head, query, span(c * i64(wide), wide)])
            if a.partial:
                peak = self.peaks[g * i64(self.lanes) + s]
                told = tirx.Select(some, peak + tirx.log(total), tirx.const(_NONE, "float32"))
                T.buffer_store(self.buffers.log_sums, told, [self.row, head, query])
