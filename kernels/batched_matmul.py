"""Matrix products with one weight matrix for each head, blocked for vector registers."""

from __future__ import annotations

import functools
from typing import Any

from tvm.script import tirx as T  # noqa: N812

from hal.kernels.vectors import span, spread, vector_lanes

ROWS = 6
"""Rows of the result that one inner loop holds in registers."""


@functools.lru_cache(maxsize=64)
def per_head(heads: int, k: int, n: int, lanes: int) -> Any:  # noqa: C901 - kernel text
    """``out[b, h] = x[b, h] @ w[h]`` in float32; B and the rows M are known at run time only.

    ``x [B, heads, M, k]``, ``w [heads, k, n]``, ``out [B, heads, M, n]``.
    """
    v = vector_lanes(n, lanes)
    wide = vector_lanes(n // v, 4 if lanes >= 16 else 2)
    kind = f"float32x{v}" if v > 1 else "float32"
    tile = v * wide
    tiles = n // tile

    @T.prim_func(s_tir=True)
    def matmul_per_head(x_data: T.handle, w_data: T.handle, out_data: T.handle):  # type: ignore[no-untyped-def]  # noqa: C901
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        batch = T.int64()
        m = T.int64()
        x = T.match_buffer(x_data, (batch, heads, m, k), "float32")
        w = T.match_buffer(w_data, (heads, k, n), "float32")
        out = T.match_buffer(out_data, (batch, heads, m, n), "float32")
        with T.sblock("root"):
            T.reads(x[0:batch, 0:heads, 0:m, 0:k], w[0:heads, 0:k, 0:n])
            T.writes(out[0:batch, 0:heads, 0:m, 0:n])
            for task in T.parallel(batch * T.int64(heads * tiles)):
                b: T.int64 = task // T.int64(heads * tiles)
                h: T.int64 = task // T.int64(tiles) % heads
                t: T.int64 = task % T.int64(tiles)
                acc = T.alloc_buffer((ROWS * wide,), kind, scope="local")
                one = T.alloc_buffer((wide,), kind, scope="local")
                for block in T.serial(m // T.int64(ROWS)):
                    for j in T.unroll(ROWS * wide):
                        acc[j] = spread(T.float32(0), v)
                    for i in T.serial(k):
                        for r in T.unroll(ROWS):
                            for j in T.unroll(wide):
                                acc[r * wide + j] = (
                                    acc[r * wide + j]
                                    + spread(x[b, h, block * ROWS + r, i], v)
                                    * w[h, i, span(t * tile + j * v, v)]
                                )
                    for r in T.unroll(ROWS):
                        for j in T.unroll(wide):
                            out[b, h, block * ROWS + r, span(t * tile + j * v, v)] = acc[
                                r * wide + j
                            ]
                for r in T.serial(m // ROWS * ROWS, m):
                    for j in T.unroll(wide):
                        one[j] = spread(T.float32(0), v)
                    for i in T.serial(k):
                        for j in T.unroll(wide):
                            one[j] = (
                                one[j]
                                + spread(x[b, h, r, i], v) * w[h, i, span(t * tile + j * v, v)]
                            )
                    for j in T.unroll(wide):
                        out[b, h, r, span(t * tile + j * v, v)] = one[j]

    return matmul_per_head
