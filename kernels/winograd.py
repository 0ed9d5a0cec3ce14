"""Convolutions with windows of 3 x 3 by Winograd's method, with fewer than half the products.

Tiles of 2 x 2 outputs are made of 4 x 4 inputs: both sides are transformed, multiplied element by
element and transformed back (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks",
2015, F(2 x 2, 3 x 3)): 16 products for 36. The products over all channels and tiles are 16 matrix
products, which :mod:`hal.kernels.convolution` computes as one convolution in 16 groups. The
transforms only add, so errors stay near those of plain sums.

Roofline: the products are bound by multiplications; the transforms read and write four times the
input and the result, which pays from a few dozen channels on (:func:`plan`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T  # noqa: N812

from hal.kernels import convolution_plan
from hal.kernels.convolution import limited
from hal.kernels.convolution_plan import Geometry, Plan
from hal.kernels.emitting import ATTRIBUTES, i64
from hal.kernels.vectors import span

_INPUTS = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
_OUTPUTS = ((1, 1, 1, 0), (0, 1, -1, -1))
_WEIGHTS = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])

_POINTS = 16
_TRANSFORM = 200
"""Cost of transforming a tile of a channel, in multiplications: it moves memory."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """A convolution in tiles: how the input is arranged for them, and the matrix products."""

    geometry: Geometry
    arranged: Plan
    products: Plan

    @property
    def size(self) -> tuple[int, int]:
        """Tiles down and across."""
        return self.arranged.geometry.out

    @property
    def count(self) -> int:
        """Tiles of a map."""
        return self.size[0] * self.size[1]


@functools.lru_cache(maxsize=1024)
def plan(geometry: Geometry, lanes: int, registers: int) -> Tiles | None:
    """The tiles, or None where plain sums are the better way."""
    g = geometry
    if (g.window, g.strides, g.dilations, g.groups) != ((3, 3), (1, 1), (1, 1), 1):
        return None
    rows, columns = (-(-extent // 2) for extent in g.out)
    plain = 9 * g.channels * g.outputs * g.out[0] * g.out[1]
    tiled = rows * columns * (_POINTS * g.channels + _TRANSFORM) * g.outputs
    tiled += rows * columns * _TRANSFORM * g.channels
    if tiled >= plain:
        return None
    top, left = g.pads[:2]
    pads = (top, left, 2 * rows + 2 - g.size[0] - top, 2 * columns + 2 - g.size[1] - left)
    inputs = Geometry(g.channels, g.channels, 1, g.size, (4, 4), (2, 2), pads=pads)
    products = Geometry(
        _POINTS * g.channels, _POINTS * g.outputs, _POINTS, (1, rows * columns), (1, 1)
    )
    arranged = convolution_plan.plan(inputs, lanes, registers)
    multiplied = convolution_plan.plan(products, lanes, registers)
    if arranged is None or multiplied is None:
        return None
    return Tiles(g, arranged, multiplied)


def pack(weights: np.ndarray, made: Tiles) -> np.ndarray:
    """``[outputs, channels, 3, 3]``, transformed, as the products' plan packs them; float32."""
    points = np.einsum("ai,mcij,bj->abmc", _WEIGHTS, weights.astype(np.float64), _WEIGHTS)
    flat = points.reshape(-1, made.geometry.channels, 1, 1).astype(np.float32)
    return convolution_plan.pack(flat, made.products)


@functools.lru_cache(maxsize=256)
def scatter(made: Tiles) -> Any:
    """``v[B, 16 * channels, tiles]`` of the arranged input ``z[B, channels, extent]``; float32."""
    g, p = made.geometry, made.arranged
    to, lanes = p.arranged, p.lanes
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("scatter")
        handles = [T.arg(name, T.handle()) for name in ("z", "v")]
        T.func_attr(ATTRIBUTES)
        batch = tirx.Var("batch", "int64")
        z = T.match_buffer(handles[0], (batch, g.channels, to.extent), "float32")
        shape = (batch, _POINTS * g.channels, made.count)
        v = T.match_buffer(handles[1], shape, "float32")
        with T.sblock("root"):
            T.reads([z[0:batch, 0 : g.channels, 0 : to.extent]])
            T.writes([v[tuple(slice(0, d) for d in shape)]])
            with T.parallel(batch * i64(g.channels)) as task:
                b = T.Bind(tirx.floordiv(task, i64(g.channels)))
                c = T.Bind(tirx.floormod(task, i64(g.channels)))
                with T.serial(i64(0), i64(to.runs)) as run:
                    for place in _places(to.length, lanes):
                        start = run * i64(to.step) + i64(place)
                        tile = [
                            T.Bind(z[b, c, span(start + i64(offset), lanes)])
                            for offset in to.offsets
                        ]
                        at = span(run * i64(to.length) + i64(place), lanes)
                        for point, value in enumerate(_transformed(tile, _INPUTS)):
                            channel = i64(point * g.channels) + c
                            T.buffer_store(v, value, [b, channel, at])
    return builder.get()


@functools.lru_cache(maxsize=256)
def gather(
    made: Tiles, *, residual: bool = False, low: float | None = None, high: float | None = None
) -> Any:
    """``out[B, outputs, height * width]`` of the products ``u[B, 16 * outputs, tiles]``; float32.

    Bias, residual and limits are as in :func:`hal.kernels.convolution.convolution`.
    """
    g = made.geometry
    down, across = made.size
    lanes = min(made.arranged.lanes, 1 << across.bit_length() - 1)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("gather")
        names = ["u", "bias", *(["residual"] if residual else []), "out"]
        handles = {name: T.arg(name, T.handle()) for name in names}
        T.func_attr(ATTRIBUTES)
        batch = tirx.Var("batch", "int64")
        maps = (batch, g.outputs, g.out[0] * g.out[1])
        shapes: dict[str, tuple[Any, ...]] = {
            "u": (batch, _POINTS * g.outputs, made.count),
            "bias": (g.outputs,),
            "residual": maps,
            "out": maps,
        }
        buffers = {n: T.match_buffer(handles[n], shapes[n], "float32") for n in names}
        with T.sblock("root"):
            whole = {n: b[tuple(slice(0, d) for d in shapes[n])] for n, b in buffers.items()}
            T.reads([whole[n] for n in names[:-1]])
            T.writes([whole["out"]])
            with T.parallel(batch * i64(g.outputs)) as task:
                b = T.Bind(tirx.floordiv(task, i64(g.outputs)))
                m = T.Bind(tirx.floormod(task, i64(g.outputs)))
                with T.serial(i64(0), i64(down)) as row:
                    for place in _places(across, lanes):
                        at = span(row * i64(across) + i64(place), lanes)
                        points = [
                            T.Bind(buffers["u"][b, i64(point * g.outputs) + m, at])
                            for point in range(_POINTS)
                        ]
                        results = [T.Bind(v) for v in _transformed(points, _OUTPUTS)]
                        for below in (0, 1):
                            inside = row * i64(2) + i64(below) < i64(g.out[0])
                            with T.If(inside), T.Then():
                                start = (row * i64(2) + i64(below)) * i64(g.out[1]) + i64(2 * place)
                                room = g.out[1] - 2 * place
                                pair = results[2 * below : 2 * below + 2]
                                _store(buffers, pair, [b, m, start], lanes, room, (low, high))
    return builder.get()


def _places(length: int, lanes: int) -> list[int]:
    """Where vectors start that cover a run; the last may lie over the one before."""
    return [min(place, length - lanes) for place in range(0, length, lanes)]


def _store(
    buffers: dict[str, Any],
    pair: Sequence[Any],
    where: list[Any],
    lanes: int,
    room: int,
    limits: tuple[float | None, float | None],
) -> None:
    """Even and odd outputs of a row of tiles, interleaved; ``room`` of them are in the map."""
    order = [i // 2 + i % 2 * lanes for i in range(2 * lanes)]
    if room >= 2 * lanes:
        value = tirx.Shuffle(list(pair), [tirx.const(i, "int32") for i in order])
        at = [*where[:2], span(where[2], 2 * lanes)]
        T.buffer_store(buffers["out"], limited(buffers, value, at, 2 * lanes, limits), at)
        return
    for i in range(room):
        value = (
            tirx.Shuffle([pair[i % 2]], [tirx.const(i // 2, "int32")]) if lanes > 1 else pair[i % 2]
        )
        at = [*where[:2], where[2] + i64(i)]
        T.buffer_store(buffers["out"], limited(buffers, value, at, 1, limits), at)


def _transformed(values: Sequence[Any], rows: Sequence[Sequence[int]]) -> list[Any]:
    """``R @ V @ R.T`` of a 4 x 4 matrix by rows; only sums."""

    def combined(items: Sequence[Any], factors: Sequence[int]) -> Any:
        total = None
        for item, factor in sorted(zip(items, factors, strict=True), key=lambda p: -p[1]):
            if factor:
                total = item if total is None else total + item if factor > 0 else total - item
        return total

    half = [[T.Bind(combined(values[j::4], row)) for j in range(4)] for row in rows]
    return [combined(line, row) for line in half for row in rows]
