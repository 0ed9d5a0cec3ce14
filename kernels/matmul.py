"""Matrix product of float32 activations with a weight matrix ``[K, N]``, as it is stored.

How many rows there are is known at run time. Few of them, as in token generation, are bound by
memory: a task takes a strip of columns and walks down K several rows of weights at a time, so that
it reads a few long runs instead of many short ones; the sums of the strip stay in a near cache.
More rows go in blocks whose sums stay in registers, each block over a tile of columns.
"""

from __future__ import annotations

import functools
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T  # noqa: N812

from hal.kernels.emitting import ATTRIBUTES, i64, remaining, vector
from hal.kernels.vectors import span, spread

DEPTH = 8
"""Rows of weights that a single row of activations is multiplied with at once."""

STRIP = 2048
"""Most columns of a strip: long runs of weights, and sums that stay in the second cache."""

HEIGHTS = (1, 4, 8)
"""Numbers of rows that go down strips together."""

PART = 1024
"""Rows of weights that many rows of activations are multiplied with before the next ones: what
both have of them stays in a near cache."""

ROWS_PER_TASK = 64
"""Rows of activations that one task takes, a multiple of every block."""


def columns_per_tile(n: int, lanes: int, most: int = 4) -> int | None:
    """Vectors per tile of columns: the largest power of two up to ``most`` that fits, or None."""
    count = most
    while count >= 1:
        if n % (lanes * count) == 0:
            return count
        count //= 2
    return None


def block_of(registers: int) -> tuple[int, int]:
    """Rows and vectors of columns whose sums fit into registers, with room for the operands."""
    return (8, 2) if registers >= 32 else (4, 2) if registers >= 16 else (2, 1)


@functools.lru_cache(maxsize=256)
def row_major(k: int, n: int, lanes: int, registers: int = 16, cores: int = 1) -> Any | None:
    """``out[M, n] = x[M, k] @ w[k, n]`` in float32; None if ``n`` is no multiple of ``lanes``."""
    rows, most = block_of(registers)
    wide = columns_per_tile(n, lanes, most)
    if wide is None:
        return None
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("matmul")
        handles = [T.arg(name, T.handle()) for name in ("x", "w", "out")]
        T.func_attr(ATTRIBUTES)
        m = tirx.Var("m", "int64")
        x = T.match_buffer(handles[0], (m, k), "float32")
        w = T.match_buffer(handles[1], (k, n), "float32")
        out = T.match_buffer(handles[2], (m, n), "float32")
        with T.sblock("root"):
            T.reads([x[0:m, 0:k], w[0:k, 0:n]])
            T.writes([out[0:m, 0:n]])
            _choose(x, w, out, m, (k, n), lanes, cores, (rows, wide), HEIGHTS)
    return builder.get()


def _choose(
    x: Any,
    w: Any,
    out: Any,
    m: Any,
    size: tuple[int, int],
    lanes: int,
    cores: int,
    block: tuple[int, int],
    heights: tuple[int, ...],
) -> None:
    """The code for few rows by how many there are, then that for many."""
    if not heights:
        _blocks(x, w, out, m, size, lanes, block)
        return
    with T.If(m <= i64(heights[0])):
        with T.Then():
            _strips(x, w, out, m, size, lanes, cores, heights[0])
        with T.Else():
            _choose(x, w, out, m, size, lanes, cores, block, heights[1:])


def _strips(
    x: Any, w: Any, out: Any, m: Any, size: tuple[int, int], lanes: int, cores: int, height: int
) -> None:
    """Up to ``height`` rows; those that are not there repeat the last one and are not stored."""
    k, n = size
    vectors = n // lanes
    tasks = -(-n // STRIP)
    tasks = min(-(-tasks // cores) * cores, vectors)
    share = -(-vectors // tasks)
    with T.parallel(i64(tasks)) as task:
        first = T.Bind(task * i64(share))
        here = tirx.max(tirx.min(i64(vectors) - first, i64(share)), i64(0))
        count = T.Bind(here * tirx.min(m, i64(1)))  # without rows nothing may be read
        sums = T.alloc_buffer((share * height,), vector("float32", lanes), scope="local")
        rows = [T.Bind(tirx.min(i64(r), m - i64(1))) if r else i64(0) for r in range(height)]
        with T.serial(i64(0), count * i64(height)) as v:
            T.buffer_store(sums, spread(tirx.const(0.0, "float32"), lanes), [v])

        def down(start: Any, depth: int) -> None:
            with T.serial(i64(0), count) as v:
                column = span((first + v) * i64(lanes), lanes)
                weights = [T.Bind(w[start + i64(d), column]) for d in range(depth)]
                for r in range(height):
                    place = v * i64(height) + i64(r)
                    total = sums[place]
                    for d in range(depth):
                        total = total + spread(x[rows[r], start + i64(d)], lanes) * weights[d]
                    T.buffer_store(sums, total, [place])

        with T.serial(i64(0), i64(k // DEPTH)) as i:
            down(i * i64(DEPTH), DEPTH)
        if k % DEPTH:
            down(i64(k // DEPTH * DEPTH), k % DEPTH)
        with T.serial(i64(0), count) as v:
            column = span((first + v) * i64(lanes), lanes)
            for r in range(height):
                with T.If(i64(r) < m), T.Then():
                    T.buffer_store(out, sums[v * i64(height) + i64(r)], [i64(r), column])


def _blocks(
    x: Any, w: Any, out: Any, m: Any, size: tuple[int, int], lanes: int, block: tuple[int, int]
) -> None:
    k, n = size
    rows, wide = block
    tiles = n // (lanes * wide)
    chunks = tirx.floordiv(m + i64(ROWS_PER_TASK - 1), i64(ROWS_PER_TASK))
    with T.parallel(i64(tiles) * chunks) as task:
        column = T.Bind(tirx.floordiv(task, chunks) * i64(lanes * wide))
        first = T.Bind(tirx.floormod(task, chunks) * i64(ROWS_PER_TASK))
        count = T.Bind(tirx.min(m - first, i64(ROWS_PER_TASK)))
        sums = T.alloc_buffer((rows * wide,), vector("float32", lanes), scope="local")

        parts = -(-k // PART)

        def product(start: Any, height: int, part: Any) -> None:
            def place(r: int, j: int) -> list[Any]:
                return [start + i64(r), span(column + i64(j * lanes), lanes)]

            places = [(r, j) for r in range(height) for j in range(wide)]

            def clear() -> None:
                for i in range(len(places)):
                    T.buffer_store(sums, spread(tirx.const(0.0, "float32"), lanes), [i])

            if parts == 1:
                clear()
            else:
                with T.If(part == i64(0)):
                    with T.Then():
                        clear()
                    with T.Else():
                        for i, at in enumerate(places):
                            T.buffer_store(sums, out[tuple(place(*at))], [i])
            before = part * i64(PART)
            with T.serial(before, tirx.min(before + i64(PART), i64(k))) as i:
                for r in range(height):
                    factor = spread(x[start + i64(r), i], lanes)
                    for j in range(wide):
                        weights = w[i, span(column + i64(j * lanes), lanes)]
                        T.buffer_store(sums, sums[r * wide + j] + factor * weights, [r * wide + j])
            for i, at in enumerate(places):
                T.buffer_store(out, sums[i], place(*at))

        whole = T.Bind(tirx.floordiv(count, i64(rows)))
        done = T.Bind(first + whole * i64(rows))
        with T.serial(i64(0), i64(parts)) as part:
            with T.serial(i64(0), whole) as i:
                product(first + i * i64(rows), rows, part)
            remaining(
                count, rows, lambda before, height: product(T.Bind(done + before), height, part)
            )
