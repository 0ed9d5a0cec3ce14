"""Scores of attention: dot products of queries with keys along the contiguous head axis."""

from __future__ import annotations

import functools
from typing import Any

from tvm.script import tirx as T  # noqa: N812

from hal.kernels.vectors import span, spread, vector_lanes


@functools.lru_cache(maxsize=64)
def scores(heads: int, kv_heads: int, size: int, lanes: int, scale: float) -> Any:
    """``out[b, h, s, t] = scale * sum over d of q[b, h, s, d] * k[b, h // group, t, d]``; float32.

    ``q [B, heads, S, size]``, ``k [B, kv_heads, T, size]``, ``out [B, heads, S, T]``; B, S and T
    are known at run time only.
    """
    v = vector_lanes(size, lanes)
    kind = f"float32x{v}" if v > 1 else "float32"
    steps, group = size // v, heads // kv_heads

    @T.prim_func(s_tir=True)
    def attention_scores(q_data: T.handle, k_data: T.handle, out_data: T.handle):  # type: ignore[no-untyped-def]
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        batch = T.int64()
        queries = T.int64()
        keys = T.int64()
        q = T.match_buffer(q_data, (batch, heads, queries, size), "float32")
        k = T.match_buffer(k_data, (batch, kv_heads, keys, size), "float32")
        out = T.match_buffer(out_data, (batch, heads, queries, keys), "float32")
        with T.sblock("root"):
            T.reads(q[0:batch, 0:heads, 0:queries, 0:size], k[0:batch, 0:kv_heads, 0:keys, 0:size])
            T.writes(out[0:batch, 0:heads, 0:queries, 0:keys])
            for bh in T.parallel(batch * T.int64(heads)):
                acc = T.alloc_buffer((1,), kind, scope="local")
                spill = T.alloc_buffer((v,), "float32", scope="local")
                total = T.alloc_buffer((1,), "float32", scope="local")
                for s in T.serial(queries):
                    for t in T.serial(keys):
                        acc[0] = spread(T.float32(0), v)
                        for i in T.unroll(steps):
                            acc[0] = (
                                acc[0]
                                + q[bh // heads, bh % heads, s, span(i * v, v)]
                                * k[bh // heads, bh % heads // group, t, span(i * v, v)]
                            )
                        spill[span(0, v)] = acc[0]
                        total[0] = T.float32(0)
                        for j in T.unroll(v):
                            total[0] = total[0] + spill[j]
                        out[bh // heads, bh % heads, s, t] = total[0] * T.float32(scale)

    return attention_scores
