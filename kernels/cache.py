"""The cache of attention in pages: writing new positions, and attending over a row's pages.

A pool is ``[pages, heads, page, channels]``; row ``b`` has position ``p`` in page
``table[b, p // page]`` at slot ``p % page``. Attention walks a row's pages once, a block of
positions at a time, for a tile of query heads that share keys; a running maximum makes one pass
enough. Keys and values of 8 or 4 bits are widened in registers, so what crosses the bus is what is
stored.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from tvm import tirx
from tvm.script import tirx as T  # noqa: N812

from hal.kernels import many_queries
from hal.kernels.attention_plan import Attention
from hal.kernels.exponential import COEFFICIENTS, LN2_HIGH, LN2_LOW, LOG2E
from hal.kernels.vectors import span, spread, vector_lanes

BLOCK = 32
"""Positions that are scored before their values are read."""

_LOWEST = -3e38

_MANY_ROWS = 16
"""New positions from which writing them is worth starting threads."""

_MANY = 4
"""Queries from which they are taken side by side, where vectors are not longer."""


DTYPES = {0: "float32", 8: "int8", 4: "uint8"}
"""What a pool stores for each width of code (0: the numbers themselves)."""


@functools.lru_cache(maxsize=64)
def write(heads: int, channels: int, dtype: str) -> Any:
    """``pool[table[b, p // page], h, p % page, :] = update[b, h, s, :]``, ``p = lengths[b] + s``.

    ``pool [P, heads, page, channels]`` is changed in place; ``update [B, heads, S, channels]``,
    ``table`` int32 ``[B, N]``, ``lengths`` int64 ``[B]``.
    """

    @T.prim_func(s_tir=True)
    def cache_write(  # type: ignore[no-untyped-def]
        pool_data: T.handle, update_data: T.handle, table_data: T.handle, lengths_data: T.handle
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        pages = T.int64()
        page = T.int64()
        batch = T.int64()
        new = T.int64()
        blocks = T.int64()
        pool = T.match_buffer(pool_data, (pages, heads, page, channels), dtype)
        update = T.match_buffer(update_data, (batch, heads, new, channels), dtype)
        table = T.match_buffer(table_data, (batch, blocks), "int32")
        lengths = T.match_buffer(lengths_data, (batch,), "int64")
        with T.sblock("root"):
            T.reads(update[0:batch, 0:heads, 0:new, 0:channels], table[0:batch, 0:blocks])
            T.writes(pool[0:pages, 0:heads, 0:page, 0:channels])
            if batch * new < T.int64(_MANY_ROWS):
                for b in T.serial(batch):
                    for s in T.serial(new):
                        for h in T.serial(heads):
                            for c in T.vectorized(channels):
                                pool[
                                    T.Cast("int64", table[b, (lengths[b] + s) // page]),
                                    h,
                                    (lengths[b] + s) % page,
                                    c,
                                ] = update[b, h, s, c]
            else:
                for task in T.parallel(batch * new):
                    row: T.int64 = task // new
                    step: T.int64 = task % new
                    at: T.int64 = T.Cast("int64", table[row, (lengths[row] + step) // page])
                    slot: T.int64 = (lengths[row] + step) % page
                    for h in T.serial(heads):
                        for c in T.vectorized(channels):
                            pool[at, h, slot, c] = update[row, h, step, c]

    return cache_write


@functools.lru_cache(maxsize=64)
def scatter(heads: int, channels: int, dtype: str) -> Any:
    """:func:`write` as a block over all elements, which are apart, for a scheduler to shape."""

    @T.prim_func(s_tir=True)
    def cache_write(  # type: ignore[no-untyped-def]
        pool_data: T.handle, update_data: T.handle, table_data: T.handle, lengths_data: T.handle
    ):
        T.func_attr({"tirx.noalias": True, "op_pattern": 8})
        pages = T.int64()
        page = T.int64()
        batch = T.int64()
        count = T.int64()
        blocks = T.int64()
        pool = T.match_buffer(pool_data, (pages, heads, page, channels), dtype)
        update = T.match_buffer(update_data, (batch, heads, count, channels), dtype)
        table = T.match_buffer(table_data, (batch, blocks), "int32")
        lengths = T.match_buffer(lengths_data, (batch,), "int64")
        for i, j, k, m in T.grid(batch, heads, count, channels):
            with T.sblock("write"):
                b, h, s, c = T.axis.remap("SSSS", [i, j, k, m])
                T.reads(update[b, h, s, c], table[b, 0:blocks], lengths[b])
                T.writes(pool[0:pages, h, 0:page, c])
                pool[
                    T.Cast("int64", table[b, (lengths[b] + s) // page]),
                    h,
                    (lengths[b] + s) % page,
                    c,
                ] = update[b, h, s, c]

    return cache_write


def _sum(x: Any, lanes: int) -> Any:
    """Sum over the lanes of a vector, by halves."""
    return _by_halves(x, lanes, lambda a, b: a + b)


def _peak(x: Any, lanes: int) -> Any:
    return _by_halves(x, lanes, T.max)


def _by_halves(x: Any, lanes: int, combine: Any) -> Any:
    while lanes > 1:
        lanes //= 2
        low = tirx.Shuffle([x], [tirx.const(i, "int32") for i in range(lanes)])
        high = tirx.Shuffle([x], [tirx.const(i + lanes, "int32") for i in range(lanes)])
        x = combine(low, high)
    return x


def _spread(number: float, lanes: int) -> Any:
    return spread(T.float32(number), lanes)


def _polynomial(f: Any, lanes: int) -> Any:
    total = _spread(COEFFICIENTS[0], lanes)
    for coefficient in COEFFICIENTS[1:]:
        total = total * f + _spread(coefficient, lanes)
    return total * f * f + f + _spread(1.0, lanes)


def _power_of_two(n: Any, lanes: int) -> Any:
    kind = f"int32x{lanes}" if lanes > 1 else "int32"
    bits = (T.Cast(kind, n) + _ints(127, lanes)) * _ints(1 << 23, lanes)
    return T.reinterpret(f"float32x{lanes}" if lanes > 1 else "float32", bits)


def _ints(number: int, lanes: int) -> Any:
    return spread(T.int32(number), lanes)


def _wide(codes: Any, lanes: int, bits: int, scale: Any, *, high: bool = False) -> Any:
    """Stored codes, times their scale, as float32; numbers that are no codes as they are."""
    kind = f"x{lanes}" if lanes > 1 else ""
    if bits == 0:
        return codes
    if bits == 8:
        return T.Cast(f"float32{kind}", codes) * _scales(scale, lanes)
    whole = T.Cast(f"int32{kind}", codes)
    part = T.shift_right(whole, _ints(4, lanes)) if high else T.bitwise_and(whole, _ints(15, lanes))
    return (T.Cast(f"float32{kind}", part) - _spread(8.0, lanes)) * _scales(scale, lanes)


def _scales(scale: Any, lanes: int) -> Any:
    return spread(T.Cast("float32", scale), lanes)


@functools.lru_cache(maxsize=64)
def attention(a: Attention) -> Any:  # noqa: C901 - kernel text
    """Causal attention of the newest positions over pages; see ``hal::CachedAttention``.

    ``(q, keys, values, table, lengths, key_scales, value_scales, out, sums)``: ``q [B, heads, S,
    channels]``, ``out [B, heads, S, value_channels]`` float32, scales float16 ``[pages, kv_heads,
    page, channels / block]``, ``sums [B, heads, S]`` (``[1, 1, 1]`` and not written unless
    ``partial``). Scales are not read if ``bits`` is 0, values not if ``shared``.
    """
    bits, tile, group, block = a.bits, a.tile, a.heads // a.kv_heads, a.block
    stored = a.channels // 2 if bits == 4 else a.channels
    value_width = stored if a.shared else (a.value_channels // 2 if bits == 4 else a.value_channels)
    low_values = min(value_width, a.value_channels)
    high_values = a.value_channels - low_values
    alike = block if bits else 0  # channels of one scale: a vector has one
    v = vector_lanes(math.gcd(stored, alike), a.lanes)
    w = vector_lanes(math.gcd(low_values, high_values, alike), a.lanes)
    steps, low_steps, high_steps = stored // v, low_values // w, high_values // w
    e = vector_lanes(BLOCK, a.lanes)
    tiles = group // tile
    heads, kv_heads, window, softcap, scale = a.heads, a.kv_heads, a.window, a.softcap, a.scale
    dtype = DTYPES[bits]
    windowed, capped, packed, more = window > 0, softcap > 0, bits == 4, high_values > 0
    kind, value_kind = (f"float32x{n}" if n > 1 else "float32" for n in (v, w))
    exp_kind = f"float32x{e}" if e > 1 else "float32"
    many, operands = max(a.lanes, _MANY), many_queries.Operands

    @T.prim_func(s_tir=True)
    def cached_attention(  # type: ignore[no-untyped-def]  # noqa: C901
        q_data: T.handle,
        keys_data: T.handle,
        values_data: T.handle,
        table_data: T.handle,
        lengths_data: T.handle,
        key_scales_data: T.handle,
        value_scales_data: T.handle,
        out_data: T.handle,
        sums_data: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        batch = T.int64()
        new = T.int64()
        pages = T.int64()
        page = T.int64()
        blocks = T.int64()
        scale_heads = T.int64()
        scale_page = T.int64()
        scale_pages = T.int64()
        scale_width = T.int64()
        value_scale_width = T.int64()
        sum_batch = T.int64()
        sum_heads = T.int64()
        sum_new = T.int64()
        q = T.match_buffer(q_data, (batch, heads, new, a.channels), "float32")
        keys = T.match_buffer(keys_data, (pages, kv_heads, page, stored), dtype)
        values = T.match_buffer(values_data, (pages, kv_heads, page, value_width), dtype)
        table = T.match_buffer(table_data, (batch, blocks), "int32")
        lengths = T.match_buffer(lengths_data, (batch,), "int64")
        key_scales = T.match_buffer(
            key_scales_data, (scale_pages, scale_heads, scale_page, scale_width), "float16"
        )
        value_scales = T.match_buffer(
            value_scales_data, (scale_pages, scale_heads, scale_page, value_scale_width), "float16"
        )
        out = T.match_buffer(out_data, (batch, heads, new, a.value_channels), "float32")
        log_sums = T.match_buffer(sums_data, (sum_batch, sum_heads, sum_new), "float32")
        with T.sblock("root"):
            T.reads(q[0:batch, 0:heads, 0:new, 0 : a.channels])
            T.writes(
                out[0:batch, 0:heads, 0:new, 0 : a.value_channels],
                log_sums[0:sum_batch, 0:sum_heads, 0:sum_new],
            )
            if new < T.int64(many):
                for task in T.parallel(batch * T.int64(kv_heads * tiles) * new):
                    b: T.int64 = task // (T.int64(kv_heads * tiles) * new)
                    kv: T.int64 = task // (T.int64(tiles) * new) % kv_heads
                    first: T.int64 = kv * group + task // new % tiles * tile
                    s: T.int64 = task % new
                    last: T.int64 = lengths[b] + s - T.int64(a.lag)
                    oldest: T.int64 = (
                        T.max(last + T.int64(a.lag - window + 1), T.int64(0))
                        if windowed
                        else T.int64(0)
                    )
                    scores = T.alloc_buffer((tile * BLOCK,), "float32", scope="global")
                    sums = T.alloc_buffer((tile * a.value_channels,), "float32", scope="global")
                    peaks = T.alloc_buffer((tile,), "float32", scope="global")
                    totals = T.alloc_buffer((tile,), "float32", scope="global")
                    dots = T.alloc_buffer((tile,), kind, scope="local")
                    wide = T.alloc_buffer((1,), kind, scope="local")
                    wide_value = T.alloc_buffer((1,), value_kind, scope="local")
                    parts = T.alloc_buffer((tile,), value_kind, scope="local")
                    x = T.alloc_buffer((1,), exp_kind, scope="local")
                    n2 = T.alloc_buffer((1,), exp_kind, scope="local")
                    best = T.alloc_buffer((1,), exp_kind, scope="local")
                    added = T.alloc_buffer((1,), exp_kind, scope="local")
                    for g in T.serial(tile):
                        peaks[g] = T.float32(_LOWEST)
                        totals[g] = T.float32(0)
                    for i in T.serial(tile * a.value_channels):
                        sums[i] = T.float32(0)
                    for n in T.serial(oldest // page, last // page + 1):
                        at: T.int64 = T.Cast("int64", table[b, n])
                        for k in T.serial((page + T.int64(BLOCK - 1)) // BLOCK):
                            lo: T.int64 = T.max(k * BLOCK, oldest - n * page)
                            hi: T.int64 = T.min(
                                T.min(k * BLOCK + BLOCK, page), last + T.int64(1) - n * page
                            )
                            if lo < hi:
                                for j in T.serial(hi - lo):
                                    for g in T.unroll(tile):
                                        dots[g] = _spread(0.0, v)
                                    for i in T.serial(steps):
                                        wide[0] = _wide(
                                            keys[at, kv, lo + j, span(i * v, v)],
                                            v,
                                            bits,
                                            key_scales[at, kv, lo + j, i * v // block],
                                        )
                                        for g in T.unroll(tile):
                                            dots[g] = (
                                                dots[g]
                                                + q[b, first + g, s, span(i * v, v)] * wide[0]
                                            )
                                        if packed:
                                            wide[0] = _wide(
                                                keys[at, kv, lo + j, span(i * v, v)],
                                                v,
                                                bits,
                                                key_scales[
                                                    at, kv, lo + j, (stored + i * v) // block
                                                ],
                                                high=True,
                                            )
                                            for g in T.unroll(tile):
                                                dots[g] = (
                                                    dots[g]
                                                    + q[b, first + g, s, span(stored + i * v, v)]
                                                    * wide[0]
                                                )
                                    for g in T.unroll(tile):
                                        scores[g * BLOCK + j] = _sum(dots[g], v) * T.float32(scale)
                                if capped:
                                    for j in T.serial(hi - lo):
                                        for g in T.unroll(tile):
                                            scores[g * BLOCK + j] = T.tanh(
                                                scores[g * BLOCK + j] * T.float32(1.0 / softcap)
                                            ) * T.float32(softcap)
                                for j in T.serial(hi - lo, T.int64(BLOCK)):
                                    for g in T.unroll(tile):
                                        scores[g * BLOCK + j] = T.float32(_LOWEST)
                                for g in T.serial(tile):
                                    best[0] = scores[span(g * BLOCK, e)]
                                    for i in T.unroll(1, BLOCK // e):
                                        best[0] = T.max(best[0], scores[span(g * BLOCK + i * e, e)])
                                    top: T.float32 = T.max(peaks[g], _peak(best[0], e))
                                    shrink: T.float32 = T.exp(peaks[g] - top)
                                    peaks[g] = top
                                    added[0] = _spread(0.0, e)
                                    for i in T.unroll(BLOCK // e):
                                        x[0] = T.max(
                                            scores[span(g * BLOCK + i * e, e)] - spread(top, e),
                                            _spread(-87.0, e),
                                        )
                                        n2[0] = T.floor(x[0] * _spread(LOG2E, e) + _spread(0.5, e))
                                        x[0] = (
                                            x[0]
                                            - n2[0] * _spread(LN2_HIGH, e)
                                            - n2[0] * _spread(LN2_LOW, e)
                                        )
                                        x[0] = _polynomial(x[0], e) * _power_of_two(n2[0], e)
                                        scores[span(g * BLOCK + i * e, e)] = x[0]
                                        added[0] = added[0] + x[0]
                                    totals[g] = totals[g] * shrink + _sum(added[0], e)
                                    if shrink != T.float32(1):
                                        for c in T.serial(a.value_channels // w):
                                            sums[span(g * a.value_channels + c * w, w)] = sums[
                                                span(g * a.value_channels + c * w, w)
                                            ] * spread(shrink, w)
                                for i in T.serial(low_steps):
                                    for g in T.unroll(tile):
                                        parts[g] = sums[span(g * a.value_channels + i * w, w)]
                                    for j in T.serial(hi - lo):
                                        wide_value[0] = _wide(
                                            (keys if a.shared else values)[
                                                at, kv, lo + j, span(i * w, w)
                                            ],
                                            w,
                                            bits,
                                            (key_scales if a.shared else value_scales)[
                                                at, kv, lo + j, i * w // block
                                            ],
                                        )
                                        for g in T.unroll(tile):
                                            parts[g] = (
                                                parts[g]
                                                + spread(scores[g * BLOCK + j], w) * wide_value[0]
                                            )
                                    for g in T.unroll(tile):
                                        sums[span(g * a.value_channels + i * w, w)] = parts[g]
                                if more:
                                    for i in T.serial(high_steps):
                                        for g in T.unroll(tile):
                                            parts[g] = sums[
                                                span(g * a.value_channels + low_values + i * w, w)
                                            ]
                                        for j in T.serial(hi - lo):
                                            wide_value[0] = _wide(
                                                (keys if a.shared else values)[
                                                    at, kv, lo + j, span(i * w, w)
                                                ],
                                                w,
                                                bits,
                                                (key_scales if a.shared else value_scales)[
                                                    at, kv, lo + j, (value_width + i * w) // block
                                                ],
                                                high=True,
                                            )
                                            for g in T.unroll(tile):
                                                parts[g] = (
                                                    parts[g]
                                                    + spread(scores[g * BLOCK + j], w)
                                                    * wide_value[0]
                                                )
                                        for g in T.unroll(tile):
                                            sums[
                                                span(g * a.value_channels + low_values + i * w, w)
                                            ] = parts[g]
                    for g in T.serial(tile):
                        for c in T.serial(a.value_channels // w):
                            out[b, first + g, s, span(c * w, w)] = sums[
                                span(g * a.value_channels + c * w, w)
                            ] * spread(
                                T.Select(
                                    totals[g] > T.float32(0), T.float32(1) / totals[g], T.float32(0)
                                ),
                                w,
                            )
                        if a.partial:
                            log_sums[b, first + g, s] = T.Select(
                                totals[g] > T.float32(0),
                                peaks[g] + T.log(totals[g]),
                                T.float32(_LOWEST),
                            )
            else:
                many_queries.emit(
                    a,
                    operands(
                        q, keys, values, table, lengths, key_scales, value_scales, out, log_sums
                    ),
                    batch,
                    new,
                    page,
                )

    return cached_attention
