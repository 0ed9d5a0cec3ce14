"""Matrix products with quantized weights that are never expanded in memory.

Two kernels. :func:`prepare` brings activations into the form that the product reads: int8 codes
with a scale for each group of K (*integer*), or floats in the order and with the powers of two that
spare the product its shifts; and the sums of each group, by which zero points are taken off.
:func:`matmul` reads the weights once, in the stream of :mod:`hal.kernels.quantized_layout`. With
one row it is bound by memory: each vector of words is decoded and multiplied at once. With more, a
block of rows shares the decoded words, in accumulators that stay in registers.

The integer product asks for a dot product of bytes; without one, :func:`prepare` rounds the
activations and gives them as floats, so that the result is the same up to the order of sums.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T  # noqa: N812

from hal.kernels.emitting import ATTRIBUTES, i64, remaining, vector
from hal.kernels.quantized_layout import Dot, Layout
from hal.kernels.vectors import span, spread

UNROLLED_STEPS = 8
"""Steps of a group that are written out; longer groups loop over as many at a time."""

ROWS_PER_TASK = 64
"""Rows that one task of a thread takes; a multiple of every block of rows."""

_HALFWAY = 60
"""Half of what exponents of E4M3 and float32 differ by."""

CHAINS = 4
"""Chains of products that advance side by side at least: the latency of one over its rate."""

AHEAD = 3072
"""Bytes between the weights that are multiplied and those that are asked for meanwhile."""

LONGEST = 4096
"""Bytes of a group up to which that is written out; longer runs are found by the machine itself."""

LINE = 64
"""Bytes of a cache line."""


def prefetches(layout: Layout) -> bool:
    """Whether asking for weights ahead pays where several rows share them.

    It fills the time that arithmetic takes. Bytes that need no decoding arrive by themselves: with
    4 rows of 2560 that took 0.55 of the roofline's time without and 0.46 with it, and with codes of
    4 bits 0.33 and 0.45 (8 rows: 0.41 and 0.61; one thread, 512-bit vectors).
    """
    decoded = layout.bits < 8 or not layout.integer
    return decoded and layout.group_bytes <= LONGEST


def tiles_side_by_side(registers: int) -> int:
    """Tiles in a block of an integer product: as many as leave room for four rows.

    A spread of activations is read for each product of one tile, and for two of two tiles. With
    256 rows, 32 registers of 512 bits and codes of 4 bits, two tiles of four rows do 740 GOP/s
    where one of eight does 580 (8 bits: 700 and 430; one thread).
    """
    return 2 if rows_per_block(registers, 2) >= 4 else 1


def rows_per_block(registers: int, tiles: int = 1) -> int:
    """Rows whose accumulators fit, for products and for sums of each tile, with four to work with.

    Tiles side by side share the activations that are spread for them.
    """
    return next((r for r in (8, 4, 2) if 2 * r * tiles + 4 <= registers), 1)


@dataclasses.dataclass(frozen=True)
class Registers:
    """Accumulators of a task.

    TVM 0.27 takes such buffers from a pool; LLVM keeps them in registers inside of loops. So they
    are taken once for a task and not once for each block of rows.
    """

    products: Any
    sums: Any


def accumulators(layout: Layout, products: int, sums: int) -> Registers:
    """So many of each, at the top of a task."""
    kind = vector("int32" if layout.integer else "float32", layout.lanes)
    return Registers(
        T.alloc_buffer((products,), kind, scope="local"),
        T.alloc_buffer((sums,), vector("float32", layout.lanes), scope="local"),
    )


def _load(buffer: Any, *index: Any) -> Any:
    return buffer[tuple(index)]


# -- the product ----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def matmul(layout: Layout, registers: int = 16, dot: Dot | None = None) -> tirx.PrimFunc:
    """``out[m, n] = x[m, k] @ w[n, k]ᵀ`` with prepared activations.

    Parameters: the packed weights ``uint8 [bytes]``; with ``layout.integer`` codes
    ``int8 [m, padded_k]``, scales ``float32 [m, groups]`` and sums ``int32 [m, groups]``, else
    values ``float32 [m, padded_k]`` and sums ``float32 [m, groups]``; the result
    ``float32 [m, padded_n]``.
    """
    most = rows_per_block(registers, layout.tiles)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("quantized_matmul")
        names = ["w", "x", "scales", "sums", "out"] if layout.integer else ["w", "x", "sums", "out"]
        handles = {name: T.arg(name, T.handle()) for name in names}
        T.func_attr(ATTRIBUTES)
        m = tirx.Var("m", "int64")
        shapes = {
            "w": ((layout.bytes,), "uint8"),
            "x": ((m, layout.padded_k), "int8" if layout.integer else "float32"),
            "scales": ((m, layout.groups), "float32"),
            "sums": ((m, layout.groups), "int32" if layout.integer else "float32"),
            "out": ((m, layout.padded_n), "float32"),
        }
        buffers = {n: T.match_buffer(handles[n], shapes[n][0], shapes[n][1]) for n in names}
        with T.sblock("root"):
            T.reads([whole_of(buffers[n], shapes[n][0]) for n in names[:-1]])
            T.writes([whole_of(buffers["out"], shapes["out"][0])])
            with T.If(m == i64(1)):
                with T.Then(), T.parallel(i64(layout.blocks)) as block:
                    tiles = [i64(tile) for tile in range(layout.tiles)]
                    registers_ = accumulators(layout, max(CHAINS, layout.tiles), layout.tiles)
                    Product(layout, dot, buffers, registers_, block, tiles, 1).rows(i64(0))
                with T.Else():
                    _many_rows(layout, dot, buffers, m, most)
    return builder.get()


def whole_of(buffer: Any, shape: Sequence[Any]) -> Any:
    """The region of a buffer that is all of it."""
    return buffer[tuple(slice(0, extent) for extent in shape)]


def _many_rows(layout: Layout, dot: Dot | None, buffers: dict[str, Any], m: Any, most: int) -> None:
    """Tasks are column blocks times chunks of rows, so that few columns still feed many cores.

    The first rows bring the weights, which later ones find in a cache.
    """
    chunks = tirx.floordiv(m + i64(ROWS_PER_TASK - 1), i64(ROWS_PER_TASK))
    tiles = [i64(tile) for tile in range(layout.tiles)]
    with T.parallel(i64(layout.blocks) * chunks) as task:
        block, chunk = tirx.floordiv(task, chunks), tirx.floormod(task, chunks)
        first = T.Bind(chunk * i64(ROWS_PER_TASK))
        count = T.Bind(tirx.min(m - first, i64(ROWS_PER_TASK)))
        whole = tirx.floordiv(count, i64(most))
        sums = most * layout.tiles
        registers = accumulators(layout, max(CHAINS, sums), sums)

        def rows(place: Any, height: int, fresh: Any = False) -> None:
            product = Product(layout, dot, buffers, registers, block, tiles, height, fresh)
            product.rows(place)

        known = i64(1 if prefetches(layout) else 0)
        if prefetches(layout):
            with T.If(whole > i64(0)), T.Then():
                rows(first, most, True)
        with T.serial(known, whole) as i:
            rows(first + i * i64(most), most)
        done = T.Bind(first + whole * i64(most))
        fresh = whole == i64(0)
        remaining(count, most, lambda before, height: rows(done + before, height, fresh))


class Product:
    """Code for some rows times one block of columns.

    ``fresh``, which may be known at run time only: the weights are read for the first time, and
    asked for ahead where that pays. ``offset``: bytes in front of the matrix.
    """

    def __init__(
        self,
        layout: Layout,
        dot: Dot | None,
        buffers: dict[str, Any],
        registers: Registers,
        block: Any,
        tiles: Sequence[Any],
        count: int,
        fresh: Any = False,
        offset: Any = None,
    ) -> None:
        self.layout, self.dot, self.buffers, self.registers = layout, dot, buffers, registers
        self.block, self.tiles, self.count = block, tiles, count
        self.offset = i64(0) if offset is None else offset
        self.fresh = fresh if prefetches(layout) else False
        self.lanes = layout.lanes
        self.kind = "int32" if layout.integer else "float32"
        # A product waits for the one before it in its chain; few rows alone make too few chains.
        self.chains = max(1, CHAINS // (count * len(tiles)))

    def rows(self, first: Any, into: Any = None) -> None:
        """Emit ``out[first : first + count, block]``, or rows from ``into`` on of ``out``."""
        into = first if into is None else into
        layout, count, lanes = self.layout, self.count, self.lanes
        for i in range(len(self.tiles) * count):
            T.buffer_store(self.registers.sums, spread(tirx.const(0.0, "float32"), lanes), [i])
        with T.serial(i64(0), i64(layout.groups)) as group:
            place = (self.block * i64(layout.groups) + group) * i64(layout.group_bytes)
            base = T.Bind(self.offset + place)
            if self.fresh is True:
                self._prefetch(base)
            elif self.fresh is not False:
                with T.If(self.fresh), T.Then():
                    self._prefetch(base)
            self._group(first, group, base)
            for t in range(len(self.tiles)):
                self._scale(first, group, base, t)
        for t, tile in enumerate(self.tiles):
            for r in range(count):
                column = self.block * i64(layout.columns) + tile * i64(lanes)
                place = [into + i64(r), span(column, lanes)]
                T.buffer_store(self.buffers["out"], self.registers.sums[t * count + r], place)

    def _prefetch(self, base: Any) -> None:
        """Ask for the bytes of a group that comes later."""
        size = self.layout.group_bytes
        later = base + i64(max(1, AHEAD // size) * size)
        start = T.Bind(tirx.min(later, i64(self.layout.bytes - size)))
        for offset in range(0, self.layout.group_bytes, LINE):
            place = tirx.address_of(self.buffers["w"][start + i64(offset)])
            how = [tirx.const(number, "int32") for number in (0, 3, 1)]  # to read, keep, data
            T.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", place, *how))

    def _group(self, first: Any, group: Any, base: Any) -> None:
        """Products of one group, into ``products``.

        Tiles take turns at each activation: one after the other, LLVM would keep and spill what
        both read.
        """
        layout = self.layout
        for t in range(len(self.tiles)):
            for r in range(self.count):
                for chain in range(self.chains):
                    start = self._start(first, group, r, chain)
                    T.buffer_store(self.registers.products, start, [self._place(t, r, chain)])
        element = group * i64(layout.padded_group)
        if layout.steps <= UNROLLED_STEPS:
            for step in range(layout.steps):
                self._step(first, base, element, i64(step))
            return
        whole = layout.steps // UNROLLED_STEPS
        with T.serial(i64(0), i64(whole)) as i:
            for step in range(UNROLLED_STEPS):
                self._step(first, base, element, i * i64(UNROLLED_STEPS) + i64(step))
        for step in range(whole * UNROLLED_STEPS, layout.steps):
            self._step(first, base, element, i64(step))

    def _start(self, first: Any, group: Any, row: int, chain: int) -> Any:
        """What sums of products start with: the common offset of codes, taken off by the sums."""
        layout = self.layout
        if chain or layout.zeros or not layout.offset:
            return spread(tirx.const(0, self.kind), self.lanes)
        sums = _load(self.buffers["sums"], first + i64(row), group)
        return spread(sums, self.lanes)

    def _place(self, tile: int, row: int, step: int) -> int:
        """The accumulator of products for one of ``tiles``, a row, and a place in a step."""
        return (tile * self.count + row) * self.chains + step % self.chains

    def _step(self, first: Any, base: Any, element: Any, step: Any) -> None:
        layout, products = self.layout, self.registers.products
        at = element + step * i64(layout.step)
        if layout.integer:
            codes = [self._bytes(base, step, tile) for tile in self.tiles]
            for j in range(layout.step // 4):
                for t in range(len(self.tiles)):
                    operand = T.Bind(codes[t][j])
                    for r in range(self.count):
                        self._dot(self._place(t, r, j), operand, first + i64(r), at + i64(4 * j))
            return
        values = [self._floats(base, step, tile) for tile in self.tiles]
        for p in range(layout.step):
            for t in range(len(self.tiles)):
                operand = T.Bind(values[t][p])
                for r in range(self.count):
                    x = spread(_load(self.buffers["x"], first + i64(r), at + i64(p)), self.lanes)
                    place = self._place(t, r, p)
                    T.buffer_store(products, products[place] + operand * x, [place])

    def _dot(self, place: int, codes: Any, row: Any, at: Any) -> None:
        dot, products = self.dot, self.registers.products
        assert dot is not None, "an integer product needs a dot instruction"
        bytes_ = vector("int8", 4 * self.lanes)
        four = tirx.reinterpret("int32", _load(self.buffers["x"], row, span(at, 4)))
        x = tirx.reinterpret(bytes_, spread(four, self.lanes))
        kind = vector("int32", self.lanes)
        total = tirx.call_llvm_pure_intrin(kind, dot.llvm, products[place], codes, x)
        T.buffer_store(products, total, [place])

    # -- decoding -----------------------------------------------------------------------------

    def _word(self, base: Any, step: Any, word: int, tile: Any) -> Any:
        layout, lanes = self.layout, self.lanes
        index = (step * i64(layout.words) + i64(word)) * i64(layout.tiles) + tile
        at = base + index * i64(4 * lanes)
        return tirx.reinterpret(
            vector("uint32", lanes), _load(self.buffers["w"], span(at, 4 * lanes))
        )

    def _constant(self, value: int) -> Any:
        return spread(tirx.const(value, "uint32"), self.lanes)

    def _field(self, word: Any, shift: int, mask: int) -> Any:
        """``(word >> shift) & mask``; a negative shift goes to the left."""
        if shift > 0:
            word = tirx.shift_right(word, self._constant(shift))
        elif shift < 0:
            word = tirx.shift_left(word, self._constant(-shift))
        return tirx.bitwise_and(word, self._constant(mask))

    def _bytes(self, base: Any, step: Any, tile: Any) -> list[Any]:
        """Codes of a step, four bytes in each lane."""
        layout = self.layout
        words = [T.Bind(self._word(base, step, w, tile)) for w in range(layout.words)]
        result = []
        for j in range(layout.step // 4):
            if layout.bits == 8:
                value = words[0]
            elif layout.bits == 3:
                low = self._field(words[j // 4], 2 * (j % 4), 0x03030303)
                value = tirx.bitwise_or(low, self._field(words[2], j - 2, 0x04040404))
            else:
                mask = ((1 << layout.bits) - 1) * 0x01010101
                value = self._field(words[0], layout.bits * j, mask)
                if layout.floats:
                    value = self._doubled(value)
            result.append(tirx.reinterpret(vector("int8", 4 * self.lanes), value))
        return result

    def _doubled(self, numbers: Any) -> Any:
        """Twice the floats of 4 bits with these numbers plus 8 (bytes of words), plus 12.

        With t from 1 to 15 that is ``4 t - clip(t, 4, 12) - 2 clip(t, 2, 14) + 4``.
        """
        kind = vector("int8", 4 * self.lanes)
        t = T.Bind(tirx.reinterpret(kind, numbers))

        def clipped(low: int, high: int) -> Any:
            ends = (spread(tirx.const(v, "int8"), 4 * self.lanes) for v in (low, high))
            bottom, top = ends
            return tirx.max(tirx.min(t, top), bottom)

        wide = T.Bind(clipped(2, 14))
        four = tirx.reinterpret(kind, tirx.shift_left(numbers, self._constant(2)))
        four = four + spread(tirx.const(4, "int8"), 4 * self.lanes)
        total = T.Bind(four - clipped(4, 12) - (wide + wide))
        return tirx.reinterpret(vector("uint32", self.lanes), total)

    def _floats(self, base: Any, step: Any, tile: Any) -> list[Any]:
        """Codes of a step as float vectors in the order of K, times powers of two."""
        layout, lanes = self.layout, self.lanes
        floats = vector("float32", lanes)
        result = []
        if layout.wide_bytes:
            for p in range(4):
                index = (step * i64(4) + i64(p)) * i64(layout.columns) + tile * i64(lanes)
                codes = tirx.reinterpret(
                    vector("int8", lanes), _load(self.buffers["w"], span(base + index, lanes))
                )
                wide = tirx.Cast(vector("int32", lanes), codes)
                if layout.floats:
                    # Sign and exponent where float32 has them; exponents differ by 120.
                    bits = tirx.shift_left(wide, spread(tirx.const(20, "int32"), lanes))
                    bits = tirx.reinterpret(vector("uint32", lanes), bits)
                    bits = tirx.bitwise_and(bits, self._constant(0x87F00000))
                    result.append(tirx.reinterpret(floats, bits))
                else:
                    result.append(tirx.Cast(floats, wide))
            return result
        if layout.floats:
            return self._float_codes(base, step, tile)
        words = [T.Bind(self._word(base, step, w, tile)) for w in range(layout.words)]
        for p in range(layout.step):
            j, byte = divmod(p, 4)
            if layout.bits == 3:
                low = self._field(words[j // 4], 8 * byte + 2 * (j % 4), 3)
                code = tirx.bitwise_or(low, self._field(words[2], 8 * byte + j - 2, 4))
            else:
                shift, mask = 8 * byte + layout.bits * j, (1 << layout.bits) - 1
                if power(layout, p):
                    code = tirx.bitwise_and(words[0], self._constant(mask << shift))
                else:
                    code = self._field(words[0], shift, mask)
            signed = tirx.reinterpret(vector("int32", lanes), code)
            result.append(tirx.Cast(floats, signed))
        return result

    def _float_codes(self, base: Any, step: Any, tile: Any) -> list[Any]:
        """Floats of 4 bits of a step, doubled and plus 12, times powers of two."""
        lanes = self.lanes
        result = []
        for four in self._bytes(base, step, tile):
            word = T.Bind(tirx.reinterpret(vector("uint32", lanes), four))
            for byte in range(4):
                code = tirx.bitwise_and(word, self._constant(0xFF << (8 * byte)))
                code = tirx.reinterpret(vector("int32", lanes), code)
                result.append(tirx.Cast(vector("float32", lanes), code))
        return result

    # -- scales -------------------------------------------------------------------------------

    def _scale(self, first: Any, group: Any, base: Any, t: int) -> None:
        """Add the products of a group, times its scales, to the sums."""
        layout, lanes, tile = self.layout, self.lanes, self.tiles[t]
        at = base + i64(layout.code_bytes)
        w = self.buffers["w"]
        scale = T.Bind(half_to_float(_load(w, span(at + tile * i64(2 * lanes), 2 * lanes)), lanes))
        if layout.floats and layout.bits == 8:
            scale = T.Bind(scale * spread(tirx.const(2.0**_HALFWAY, "float32"), lanes))
        zero = None
        if layout.zeros:
            points = _load(w, span(at + i64(2 * layout.columns) + tile * i64(lanes), lanes))
            if layout.signed_bytes:
                points = tirx.reinterpret(vector("int8", lanes), points)
            zero = T.Bind(
                tirx.Cast(vector(self.kind, lanes), tirx.Cast(vector("int32", lanes), points))
            )
        products, sums = self.registers.products, self.registers.sums
        for r in range(self.count):
            total = products[self._place(t, r, 0)]
            for chain in range(1, self.chains):
                total = total + products[self._place(t, r, chain)]
            row = first + i64(r)
            if zero is not None:
                total = total - zero * spread(_load(self.buffers["sums"], row, group), lanes)
            factor = scale
            if layout.integer:
                total = tirx.Cast(vector("float32", lanes), total)
                factor = factor * spread(_load(self.buffers["scales"], row, group), lanes)
            place = t * self.count + r
            T.buffer_store(sums, sums[place] + total * factor, [place])


def power(layout: Layout, place: int) -> int:
    """Bits by which the code at ``place`` of a step is too high, taken off the activation.

    Codes that are floats of 8 bits are too low, by twice as much as activations can make up for.
    """
    if layout.floats and not layout.integer:
        return 8 * (place % 4) if layout.bits == 4 else -_HALFWAY
    if layout.wide_bytes or layout.integer or layout.bits == 3:
        return 0
    j, byte = divmod(place % layout.step, 4)
    shift = 8 * byte + layout.bits * j
    return 0 if shift + layout.bits == 32 else shift


def half_to_float(data: Any, lanes: int) -> Any:
    """Float32 of ``lanes`` finite float16 numbers given as bytes, without an instruction for it."""
    halves = tirx.Cast(vector("uint32", lanes), tirx.reinterpret(vector("uint16", lanes), data))

    def constant(value: int) -> Any:
        return spread(tirx.const(value, "uint32"), lanes)

    magnitude = tirx.shift_left(tirx.bitwise_and(halves, constant(0x7FFF)), constant(13))
    sign = tirx.shift_left(tirx.bitwise_and(halves, constant(0x8000)), constant(16))
    floats = vector("float32", lanes)
    # The exponents of the two formats differ by 112, subnormal numbers included.
    value = tirx.reinterpret(floats, magnitude) * spread(tirx.const(2.0**112, "float32"), lanes)
    bits = tirx.bitwise_or(tirx.reinterpret(vector("uint32", lanes), value), sign)
    return tirx.reinterpret(floats, bits)
