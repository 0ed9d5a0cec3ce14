"""Putting the input of a convolution where its kernel reads vectors of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T  # noqa: N812

from hal.kernels.convolution_plan import Plan
from hal.kernels.emitting import ATTRIBUTES, i64
from hal.kernels.vectors import span

_WRITTEN_OUT = 16
"""Most vectors of a row whose places are written out."""


@functools.lru_cache(maxsize=256)
def arrange(made: Plan, dtype: str = "float32", border: int = 0) -> Any:
    """``z[B, channels, extent]`` of ``x[B, channels, height, width]``, ``border`` around it."""
    g, to = made.geometry, made.arranged
    high, across = g.size
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("arrange")
        handles = [T.arg(name, T.handle()) for name in ("x", "z")]
        T.func_attr(ATTRIBUTES)
        batch = tirx.Var("batch", "int64")
        x = T.match_buffer(handles[0], (batch, g.channels, high, across), dtype)
        z = T.match_buffer(handles[1], (batch, g.channels, to.extent), dtype)
        with T.sblock("root"):
            T.reads([x[0:batch, 0 : g.channels, 0:high, 0:across]])
            T.writes([z[0:batch, 0 : g.channels, 0 : to.extent]])
            with T.parallel(batch * i64(g.channels)) as task:
                b = T.Bind(tirx.floordiv(task, i64(g.channels)))
                c = T.Bind(tirx.floormod(task, i64(g.channels)))
                arrange_channel(made, x, z, [b, c], [b, c], border)
    return builder.get()


def arrange_channel(
    made: Plan,
    x: Any,
    z: Any,
    source: list[Any],
    target: list[Any],
    border: int,
    read: Callable[[Any, int], Any] = lambda values, _: values,
) -> None:
    """Code that arranges the channel ``source`` of ``x``, two indices, as ``target`` of ``z``.

    ``read`` makes elements of ``z`` of those of ``x``, so many lanes at a time.
    """
    g, to = made.geometry, made.arranged
    (high, across), (top, left) = g.size, g.pads[:2]

    def clear(start: Any, count: int) -> None:
        with T.serial(i64(0), i64(count)) as i:
            T.buffer_store(z, tirx.const(border, z.dtype), [*target, start + i])

    for number, (row, column) in enumerate(to.planes):
        # Columns whose source is inside, a stride apart.
        first = min(max(-(-(left - column) // g.strides[1]), 0), to.pitch)
        end = min(max(-(-(across + left - column) // g.strides[1]), first), to.pitch)
        with T.serial(i64(0), i64(to.rows)) as r:
            start = T.Bind((i64(number * to.rows) + r) * i64(to.pitch))
            line = T.Bind(r * i64(g.strides[0]) + i64(row - top))
            inside = tirx.all(line >= i64(0), line < i64(high))
            with T.If(inside):
                with T.Then():
                    if first:
                        clear(start, first)
                    _take(
                        x,
                        z,
                        [*source, line],
                        [*target, start + i64(first)],
                        first * g.strides[1] + column - left,
                        end - first,
                        g.strides[1],
                        across,
                        made.lanes,
                        read,
                    )
                    if end < to.pitch:
                        clear(start + i64(end), to.pitch - end)
                with T.Else():
                    clear(start, to.pitch)


def _take(
    x: Any,
    z: Any,
    row: list[Any],
    to: list[Any],
    first: int,
    count: int,
    stride: int,
    across: int,
    lanes: int,
    read: Callable[[Any, int], Any],
) -> None:
    """Copy ``count`` elements of a row from ``first`` on, ``stride`` apart, to neighbours."""
    lanes = min(lanes, 1 << max(count, 1).bit_length() - 1)
    starts = [min(v, count - lanes) for v in range(0, count, lanes)]
    if stride != 2 or lanes < 2 or len(starts) > _WRITTEN_OUT:
        with T.serial(i64(0), i64(count)) as i:
            T.buffer_store(
                z, read(x[(*row, i * i64(stride) + i64(first))], 1), [*to[:2], to[2] + i]
            )
        return
    for start in starts:
        # Two vectors of which every second element counts, from an even place or an odd one:
        # whichever stays in the row.
        place, odd = 2 * start + first, 0
        if place + 2 * lanes > across:
            place, odd = place - 1, 1
        if place < 0:
            pieces = [x[(*row, i64(place + odd + 2 * i))] for i in range(lanes)]
            value = tirx.Shuffle(pieces, [tirx.const(i, "int32") for i in range(lanes)])
        else:
            both = x[(*row, span(i64(place), 2 * lanes))]
            order = [tirx.const(2 * i + odd, "int32") for i in range(lanes)]
            value = tirx.Shuffle([both], order)
        T.buffer_store(z, read(value, lanes), [*to[:2], span(to[2] + i64(start), lanes)])
