"""Matrix product of activations with a weight matrix, blocked for vector registers.

Two layouts of the weights: ``[K, N]`` (columns of a tile side by side in vectors) and ``[N, K]``
(dot products along K). The number of rows is known at run time only; a single row, as in token
generation, takes a path of its own that streams the weights once.
"""

from __future__ import annotations

import functools
from typing import Any

from tvm.script import tirx as T  # noqa: N812

ROWS = 6
"""Rows of the result that one inner loop holds in registers."""


def columns_per_tile(n: int, lanes: int, most: int = 4) -> int | None:
    """Vectors per tile of columns: the largest power of two up to ``most`` that fits, or None."""
    count = most
    while count >= 1:
        if n % (lanes * count) == 0:
            return count
        count //= 2
    return None


@functools.lru_cache(maxsize=256)
def row_major(k: int, n: int, lanes: int) -> Any | None:  # noqa: C901 - kernel text
    """``out[M, n] = x[M, k] @ w[k, n]`` in float32; None if ``n`` is no multiple of ``lanes``."""
    wide = columns_per_tile(n, lanes, 4 if lanes >= 16 else 2)
    stream = columns_per_tile(n, lanes, 8)
    if wide is None or stream is None:
        return None
    kind = f"float32x{lanes}"
    tile, strip = lanes * wide, lanes * stream

    @T.prim_func(s_tir=True)
    def matmul(x_data: T.handle, w_data: T.handle, out_data: T.handle):  # type: ignore[no-untyped-def]  # noqa: C901
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        m = T.int64()
        x = T.match_buffer(x_data, (m, k), "float32")
        w = T.match_buffer(w_data, (k, n), "float32")
        out = T.match_buffer(out_data, (m, n), "float32")
        with T.sblock("root"):
            T.reads(x[0:m, 0:k], w[0:k, 0:n])
            T.writes(out[0:m, 0:n])
            if m == T.int64(1):
                for t in T.parallel(n // strip):
                    acc = T.alloc_buffer((stream,), kind, scope="local")
                    for j in T.unroll(stream):
                        acc[j] = T.broadcast(T.float32(0), lanes)
                    for i in T.serial(k):
                        for j in T.unroll(stream):
                            acc[j] = (
                                acc[j]
                                + T.broadcast(x[0, i], lanes)
                                * w[i, T.ramp(t * strip + j * lanes, 1, lanes)]
                            )
                    for j in T.unroll(stream):
                        out[0, T.ramp(t * strip + j * lanes, 1, lanes)] = acc[j]
            else:
                for t in T.parallel(n // tile):
                    for b in T.serial(m // T.int64(ROWS)):
                        acc2 = T.alloc_buffer((ROWS * wide,), kind, scope="local")
                        for j in T.unroll(ROWS * wide):
                            acc2[j] = T.broadcast(T.float32(0), lanes)
                        for i in T.serial(k):
                            for r in T.unroll(ROWS):
                                for j in T.unroll(wide):
                                    acc2[r * wide + j] = (
                                        acc2[r * wide + j]
                                        + T.broadcast(x[b * ROWS + r, i], lanes)
                                        * w[i, T.ramp(t * tile + j * lanes, 1, lanes)]
                                    )
                        for r in T.unroll(ROWS):
                            for j in T.unroll(wide):
                                out[b * ROWS + r, T.ramp(t * tile + j * lanes, 1, lanes)] = acc2[
                                    r * wide + j
                                ]
                    for r in T.serial(m % T.int64(ROWS)):
                        acc3 = T.alloc_buffer((wide,), kind, scope="local")
                        for j in T.unroll(wide):
                            acc3[j] = T.broadcast(T.float32(0), lanes)
                        for i in T.serial(k):
                            for j in T.unroll(wide):
                                acc3[j] = (
                                    acc3[j]
                                    + T.broadcast(x[m // ROWS * ROWS + r, i], lanes)
                                    * w[i, T.ramp(t * tile + j * lanes, 1, lanes)]
                                )
                        for j in T.unroll(wide):
                            out[m // ROWS * ROWS + r, T.ramp(t * tile + j * lanes, 1, lanes)] = (
                                acc3[j]
                            )

    return matmul
