"""Activations in the form that products with quantized weights read.

*Integer*: int8 codes, a float32 scale for each group along K, and the sum of a group's codes, by
which the product takes zero points off. *Float*: values in float32, each times the power of two
that its weight code is stored too high by, and the sum of a group's values. Either can round the
activations to 8 bits in blocks, exactly as the reference does: scale = max|x| / 127,
code = round half even(x / scale).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T  # noqa: N812

from hal.kernels.emitting import ATTRIBUTES, i64, vector
from hal.kernels.quantized_layout import Layout
from hal.kernels.quantized_matmul import power
from hal.kernels.vectors import span, spread

PARALLEL_ELEMENTS = 32768
"""Activations from which preparing them is worth starting threads."""

_ROUNDER = float(3 << 22)
"""Added to a number of up to 22 bits, its integer part ends in the low bits, rounded half even."""


def _float(value: float, lanes: int) -> Any:
    return spread(tirx.const(value, "float32"), lanes)


@functools.lru_cache(maxsize=256)
def prepare(layout: Layout, block: int = 0, bits: int = 8) -> tirx.PrimFunc:
    """Activations ``x float32 [m, k]`` for a product with weights of this layout.

    ``block``: activations that share a scale when they are rounded: a multiple of the layout's
    group or at least ``k``; 0 leaves them as they are (only where the layout is for floats).
    ``bits``: how finely they are rounded, at most 8.
    Parameters after ``x``: the outputs, which are what ``quantized_matmul`` takes after weights.
    """
    names = ["codes", "scales", "sums"] if layout.integer else ["values", "sums"]
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("prepare_activations")
        handles = {name: T.arg(name, T.handle()) for name in ["x", *names]}
        T.func_attr(ATTRIBUTES)
        m = tirx.Var("m", "int64")
        shapes: dict[str, tuple[int, str]] = {
            "x": (layout.k, "float32"),
            "codes": (layout.padded_k, "int8"),
            "values": (layout.padded_k, "float32"),
            "scales": (layout.groups, "float32"),
            "sums": (layout.groups, "int32" if layout.integer else "float32"),
        }
        buffers = {
            n: T.match_buffer(handles[n], (m, shapes[n][0]), shapes[n][1]) for n in ["x", *names]
        }
        with T.sblock("root"):
            T.reads([buffers["x"][0:m, 0 : layout.k]])
            T.writes([buffers[n][0:m, 0 : shapes[n][0]] for n in names])
            with T.If(m < i64(max(2, PARALLEL_ELEMENTS // layout.k))):
                with T.Then(), T.serial(i64(0), m) as row:
                    _Row(layout, block, bits, buffers, row).emit()
                with T.Else(), T.parallel(m) as row:
                    _Row(layout, block, bits, buffers, row).emit()
    return builder.get()


def folded(value: Any, lanes: int, combine: Callable[[Any, Any], Any]) -> Any:
    """One number from the lanes of a vector, halves first."""
    while lanes > 1:
        lanes //= 2
        whole = T.Bind(value)
        low, high = (
            tirx.Shuffle([whole], [tirx.const(i, "int32") for i in range(first, first + lanes)])
            for first in (0, lanes)
        )
        value = combine(low, high)
    return T.Bind(value)


class _Row:
    """Code for one row."""

    def __init__(
        self, layout: Layout, block: int, bits: int, buffers: dict[str, Any], row: Any
    ) -> None:
        self.layout, self.buffers, self.row = layout, buffers, row
        self.block, self.limit = min(block, layout.k), float((1 << (bits - 1)) - 1)
        self.state = T.alloc_buffer((4,), "float32", scope="local")

    def emit(self) -> None:
        layout = self.layout
        size = self.block or layout.group
        whole = layout.k // size
        with T.serial(i64(0), i64(whole)) as b:
            self._block(b, size)
        if layout.k % size:
            self._block(i64(whole), layout.k % size)

    def _block(self, b: Any, size: int) -> None:
        """Activations that share a scale; they are one group or several."""
        layout, step = self.layout, self.block or self.layout.group
        if self.block:
            self._find_scale(b * i64(step), size)
        first = b * i64(step // layout.group) if step % layout.group == 0 else b
        whole = size // layout.group
        with T.serial(i64(0), i64(whole)) as g:
            self._group(first + g, layout.group)
        if size % layout.group:
            self._group(first + i64(whole), size % layout.group)

    def _lanes(self, size: int) -> int:
        lanes = self.layout.lanes
        while size % lanes:
            lanes //= 2
        return max(lanes, 1)

    def _find_scale(self, first: Any, size: int) -> None:
        """``state[0]`` becomes the scale and ``state[1]`` what to divide by."""
        lanes = self._lanes(size)
        largest = T.alloc_buffer((1,), vector("float32", lanes), scope="local")
        T.buffer_store(largest, _float(0.0, lanes), [0])
        with T.serial(i64(0), i64(size // lanes)) as i:
            x = self.buffers["x"][self.row, span(first + i * i64(lanes), lanes)]
            T.buffer_store(largest, tirx.max(largest[0], tirx.abs(x)), [0])
        top = folded(largest[0], lanes, tirx.max)
        T.buffer_store(self.state, top / tirx.const(self.limit, "float32"), [0])
        scale, one = self.state[0], tirx.const(1.0, "float32")
        T.buffer_store(self.state, tirx.Select(scale > tirx.const(0.0, "float32"), scale, one), [1])

    def _group(self, group: Any, size: int) -> None:
        """Codes or values of one group and their sum."""
        layout, row = self.layout, self.row
        lanes = self._lanes(size)
        name, kind = ("codes", "int32") if layout.integer else ("values", "float32")
        target = self.buffers[name]
        sums = T.alloc_buffer((1,), vector(kind, lanes), scope="local")
        T.buffer_store(sums, spread(tirx.const(0, kind), lanes), [0])
        source, place = group * i64(layout.group), group * i64(layout.padded_group)

        def part(i: Any, factors: Any) -> None:
            x = self.buffers["x"][row, span(source + i * i64(lanes), lanes)]
            value = x
            if self.block:
                magic = _float(_ROUNDER, lanes)
                shifted = T.Bind(x / spread(self.state[1], lanes) + magic)
                if layout.integer:
                    bits = tirx.reinterpret(vector("int32", lanes), shifted)
                    value = bits - spread(tirx.const(0x4B400000, "int32"), lanes)
                else:
                    value = (shifted - magic) * spread(self.state[0], lanes)
            value = T.Bind(value)
            T.buffer_store(sums, sums[0] + value, [0])
            if layout.integer:
                value = tirx.Cast(vector("int8", lanes), value)
            elif factors is not None:
                value = value * factors
            T.buffer_store(target, value, [row, span(place + i * i64(lanes), lanes)])

        powers = {power(layout, p) for p in range(layout.step)}
        if len(powers) == 1:
            factors = None if powers == {0} else self._powers(0, lanes)
            with T.serial(i64(0), i64(size // lanes)) as i:
                part(i, factors)
        else:
            for j in range(size // lanes):
                part(i64(j), self._powers(j * lanes, lanes))
        if size < layout.padded_group:
            self._clear(target, place, size)
        total = folded(sums[0], lanes, lambda a, b: a + b)
        factor = tirx.const(1 if layout.zeros else -layout.offset, kind)
        T.buffer_store(self.buffers["sums"], total * factor, [row, group])
        if layout.integer:
            T.buffer_store(self.buffers["scales"], self.state[0], [row, group])

    def _clear(self, target: Any, place: Any, size: int) -> None:
        zero = tirx.const(0, "int8" if self.layout.integer else "float32")
        with T.serial(i64(size), i64(self.layout.padded_group)) as i:
            T.buffer_store(target, zero, [self.row, place + i])

    def _powers(self, first: int, lanes: int) -> Any:
        """The powers of two of ``lanes`` neighbours, as a vector."""
        layout = self.layout
        values = [2.0 ** -power(layout, p) for p in range(first, first + lanes)]
        parts = [tirx.const(v, "float32") for v in values]
        order = [tirx.const(i, "int32") for i in range(lanes)]
        return tirx.Shuffle(parts, order) if lanes > 1 else parts[0]
