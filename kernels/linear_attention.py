"""Linear attention: a state for each head, decayed, corrected and read token by token.

Columns of the state do not touch each other, so blocks of them run in parallel next to batch and
heads, each block in vectors along the contiguous axis. What the state holds at a key is summed up
while the token before is written, so that a token goes over its block once.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from tvm.script import tirx as T  # noqa: N812

from hal.kernels.vectors import vector_lanes

VECTORS = 4
"""Vectors of a block of columns that advance together."""


@dataclasses.dataclass(frozen=True)
class Form:
    """What a kernel is written for: extents, widths of the gates, and the update rule.

    ``decay_width`` is 0 (none), 1 (one for each head) or ``key_size``; ``rate_heads`` is 0 (none:
    values are written as they are), 1 or ``heads``. ``group`` query heads share one of ``heads``.
    """

    heads: int
    group: int
    key_size: int
    value_size: int
    decay_width: int
    rate_heads: int
    scale: float


@functools.lru_cache(maxsize=64)
def linear_attention(form: Form, lanes: int) -> Any:  # noqa: C901 - kernel text
    """ONNX ``LinearAttention`` on float32.

    For each head and token::

        S = decay * S;  S = S + k (rate * (v - S' k))';  y = scale * S' q

    ``q [B, T, heads * group * K]``, ``k [B, T, heads * K]``, ``v [B, T, heads * V]``, ``past`` and
    ``present`` ``[B, heads, K, V]``, ``y [B, T, heads * group * V]``. ``decay [B, T, heads *
    width]`` is the factor, not its logarithm; ``rate [B, T, rate_heads]``. Gates of a width of 0
    are given as ``[B, T, 1]`` and not read. B and T are known at run time only.
    """
    heads, group, size, width = form.heads, form.group, form.key_size, form.value_size
    v_lanes = vector_lanes(width, lanes)
    kind = f"float32x{v_lanes}" if v_lanes > 1 else "float32"
    vectors = next(n for n in (VECTORS, 2, 1) if width // v_lanes % n == 0)
    blocks = width // (v_lanes * vectors)
    decays = heads * form.decay_width or 1
    rates = form.rate_heads or 1
    gated, delta = form.decay_width > 0, form.rate_heads > 0
    by_channel = form.decay_width == size and size > 1
    one_rate = form.rate_heads == 1

    def at(start: Any, u: Any) -> Any:
        """Index of vector ``u`` of the block that starts at ``start``."""
        return T.ramp(start + u * v_lanes, 1, v_lanes) if v_lanes > 1 else start + u

    def wide(x: Any) -> Any:
        return T.broadcast(x, v_lanes) if v_lanes > 1 else x

    def key(k: Any, decay: Any, b: Any, t: Any, h: Any, d: Any) -> Any:
        """Key channel ``d`` as it meets the state before token ``t`` decays it."""
        value = k[b, t, h * size + d]
        return value * decay[b, t, h * size + d] if by_channel else value

    @T.prim_func(s_tir=True)
    def attend(  # type: ignore[no-untyped-def]  # noqa: C901 - kernel text
        q_data: T.handle,
        k_data: T.handle,
        v_data: T.handle,
        p_data: T.handle,
        d_data: T.handle,
        r_data: T.handle,
        y_data: T.handle,
        s_data: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        batch = T.int64()
        length = T.int64()
        q = T.match_buffer(q_data, (batch, length, heads * group * size), "float32")
        k = T.match_buffer(k_data, (batch, length, heads * size), "float32")
        v = T.match_buffer(v_data, (batch, length, heads * width), "float32")
        past = T.match_buffer(p_data, (batch, heads, size, width), "float32")
        decay = T.match_buffer(d_data, (batch, length, decays), "float32")
        rate = T.match_buffer(r_data, (batch, length, rates), "float32")
        y = T.match_buffer(y_data, (batch, length, heads * group * width), "float32")
        state = T.match_buffer(s_data, (batch, heads, size, width), "float32")
        with T.sblock("root"):
            T.reads(
                q[0:batch, 0:length, 0 : heads * group * size],
                k[0:batch, 0:length, 0 : heads * size],
                v[0:batch, 0:length, 0 : heads * width],
                past[0:batch, 0:heads, 0:size, 0:width],
                decay[0:batch, 0:length, 0:decays],
                rate[0:batch, 0:length, 0:rates],
            )
            T.writes(
                y[0:batch, 0:length, 0 : heads * group * width],
                state[0:batch, 0:heads, 0:size, 0:width],
            )
            for task in T.parallel(batch * T.int64(heads * blocks)):
                row = T.alloc_buffer((1,), kind, scope="local")
                held = T.alloc_buffer((vectors,), kind, scope="local")
                write = T.alloc_buffer((vectors,), kind, scope="local")
                read = T.alloc_buffer((group * vectors,), kind, scope="local")
                b: T.let = task // (heads * blocks)
                h: T.let = task // blocks % heads
                c: T.let = task % blocks * (vectors * v_lanes)
                for u in T.unroll(vectors):
                    held[u] = wide(T.float32(0))
                for d in T.serial(size):
                    for u in T.unroll(vectors):
                        row[0] = past[b, h, d, at(c, u)]
                        state[b, h, d, at(c, u)] = row[0]
                        if delta and length > 0:
                            held[u] = held[u] + row[0] * wide(key(k, decay, b, 0, h, d))
                for t in T.serial(length):
                    for u in T.unroll(vectors):
                        write[u] = v[b, t, at(h * width + c, u)]
                        if delta and gated and not by_channel:
                            held[u] = held[u] * wide(decay[b, t, h])
                        if delta:
                            write[u] = (write[u] - held[u]) * wide(rate[b, t, 0 if one_rate else h])
                        held[u] = wide(T.float32(0))
                    for i in T.unroll(group * vectors):
                        read[i] = wide(T.float32(0))
                    for d in T.serial(size):
                        for u in T.unroll(vectors):
                            row[0] = state[b, h, d, at(c, u)]
                            if gated:
                                row[0] = row[0] * wide(
                                    decay[b, t, h * size + d if by_channel else h]
                                )
                            row[0] = row[0] + wide(k[b, t, h * size + d]) * write[u]
                            state[b, h, d, at(c, u)] = row[0]
                            if delta:
                                held[u] = held[u] + row[0] * wide(
                                    key(k, decay, b, T.min(t + 1, length - 1), h, d)
                                )
                            for g in T.unroll(group):
                                read[g * vectors + u] = read[g * vectors + u] + row[0] * wide(
                                    q[b, t, (h * group + g) * size + d]
                                )
                    for g in T.unroll(group):
                        for u in T.unroll(vectors):
                            y[
                                b,
                                t,
                                at((h * group + g) * width + c, u),
                            ] = read[g * vectors + u] * wide(T.float32(form.scale))

    return attend
