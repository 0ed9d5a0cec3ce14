"""Convolution and maxima of maps of 8-bit codes, four channels in a word of 32 bits.

*Words* are ``int32[B, channels / 4, height * width]``: the codes of four neighbouring channels of
one pixel, the first in the lowest byte. So the chip's dot product of four bytes takes the place of
the float kernel's multiplication and addition, with the same shifted rows, planes and blocks
(:mod:`hal.kernels.convolution`), and a word of weights is broadcast as a float is there.

Sums are exact. What follows them in the graph follows here, in registers: scale, bias, a rounding
to codes and back, a residual in words, limits, and the rounding to the codes that are stored, four
channels to a word again. Codes count from 0 to 255 here, those of ``int8`` tensors are moved there
with their zero points; where the chip's dot product takes signed bytes only, words hold them less
128, which is a flip of their highest bits.

Roofline: ``4 * 2 * height * wide * lanes`` operations on ``height + wide`` loads a tap.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T  # noqa: N812

from hal.kernels import convolution_plan
from hal.kernels.convolution import Terms
from hal.kernels.convolution_plan import Geometry, Plan
from hal.kernels.emitting import i64, vector
from hal.kernels.quantized_layout import Dot
from hal.kernels.vectors import span, spread

PER_WORD = 4
MOST = 255
_EXACT = 1 << 24
"""Whole numbers below it are exact in float32."""
_WHOLE = 1.5 * 2**23
_WHOLE_BITS = int(np.float32(_WHOLE).view(np.int32))
"""A number that, added to one below 2^22, has it rounded to the even whole one in its last bits."""

_FLIP = -0x7F7F7F80  # 0x80 in every byte


@dataclasses.dataclass(frozen=True)
class Rounding:
    """Codes of a tensor: ``code = clip(round(x / scale) + zero, 0, 255)``."""

    scale: float
    zero: int


@dataclasses.dataclass(frozen=True)
class Codes(Terms):
    """What a convolution of codes sums, and what follows.

    ``x`` are the input's codes. ``start`` (int32), ``factor`` and ``bias`` (float32) have an
    element for each output channel, see :func:`pack`; ``middle`` rounds the sums before
    ``residual`` is added; limits apply to the sum; ``out`` are the codes that are stored, None:
    floats are.
    """

    dot: Dot
    x: Rounding
    out: Rounding | None
    middle: Rounding | None = None
    residual: Rounding | None = None
    low: float | None = None
    high: float | None = None
    dtype: ClassVar[str] = "int32"
    given: ClassVar[str] = "int32"

    @property
    def border(self) -> int:
        """The input's zero point in each byte."""
        return word_of(self.x.zero, self.dot)

    def packed_shape(self, made: Plan) -> tuple[int, int, int]:
        """With room for a vector behind the last channel."""
        blocks, terms, height = made.packed_shape
        return blocks, terms + -(-made.lanes // height) - 1, height

    def corner_lanes(self, made: Plan) -> int:
        """A whole vector, as the dot product has it; the last ones may be of other channels."""
        return made.lanes

    def parameters(self, made: Plan, batch: Any) -> dict[str, tuple[tuple[Any, ...], str]]:
        """Start, factor and bias; the residual in words; the result in words or floats."""
        g = made.geometry
        pixels = g.out[0] * g.out[1]
        words = (batch, g.outputs // PER_WORD, pixels)
        each = (padded(made),)
        kinds: dict[str, tuple[tuple[Any, ...], str]] = {
            "start": (each, "int32"),
            "factor": (each, "float32"),
            "bias": (each, "float32"),
        }
        if self.residual:
            kinds["residual"] = words, "int32"
        kinds["out"] = (words, "int32") if self.out else ((batch, g.outputs, pixels), "float32")
        return kinds

    def first(self, buffers: dict[str, Any], channel: Any, lanes: int) -> Any:
        """What takes the zero point off."""
        return spread(buffers["start"][channel], lanes)

    def add(self, total: Any, values: Any, factor: Any, lanes: int) -> Any:
        """Four products."""
        kind = vector("int8", PER_WORD * lanes)
        a, b = tirx.reinterpret(kind, values), tirx.reinterpret(kind, factor)
        return tirx.call_llvm_pure_intrin(vector("int32", lanes), self.dot.llvm, total, a, b)

    def store(
        self, made: Plan, buffers: dict[str, Any], at: Any, sums: list[list[Any]], places: list[Any]
    ) -> None:
        """Vectors of pixels: words of four channels, or floats."""
        image, first, inner = at
        for r in range(0, made.height, PER_WORD):
            with T.If(inner + i64(r) < i64(made.geometry.outputs)), T.Then():
                for j, place in enumerate(places):
                    where = span(place, made.lanes)
                    word = T.Bind(tirx.floordiv(first + i64(r), i64(PER_WORD)))
                    values = []
                    for k in range(PER_WORD):
                        channel = first + i64(r + k)
                        factor, bias = (
                            spread(buffers[n][channel], made.lanes) for n in ("factor", "bias")
                        )
                        byte = self._residual(buffers, image, word, where, made.lanes, k)
                        value = self._value(sums[r + k][j], factor, bias, byte, made.lanes)
                        values.append(value)
                    if self.out:
                        total = _word(values, self.out.zero, self.dot, made.lanes)
                        T.buffer_store(buffers["out"], total, [image, word, where])
                        continue
                    for k, value in enumerate(values):
                        T.buffer_store(buffers["out"], value, [image, first + i64(r + k), where])

    def store_corner(
        self, made: Plan, buffers: dict[str, Any], at: Any, totals: list[Any], places: list[Any]
    ) -> None:
        """Vectors of channels, of which those of the block count."""
        image, first, inner = at
        lanes = made.lanes
        each = span(first, lanes)
        start, factor, bias = (T.Bind(buffers[n][each]) for n in ("start", "factor", "bias"))
        for total, place in zip(totals, places, strict=True):
            byte = None
            if self.residual:
                found = []
                for q in range(lanes // PER_WORD):
                    last = i64(made.geometry.outputs // PER_WORD - 1)
                    word = tirx.min(tirx.floordiv(first, i64(PER_WORD)) + i64(q), last)
                    found.append(_flipped(buffers["residual"][image, word, place], self.dot, 1))
                whole = tirx.Shuffle(found, [tirx.const(q, "int32") for q in range(len(found))])
                kind = vector("uint8", lanes)
                byte = tirx.reinterpret(kind, whole).astype(vector("int32", lanes))
            value = T.Bind(self._value(total + start, factor, bias, byte, lanes))
            if self.out:
                least = spread(tirx.const(_WHOLE_BITS - self.out.zero, "int32"), lanes)
                codes = (value - least).astype(vector("uint8", lanes))
                packed = T.Bind(tirx.reinterpret(vector("int32", lanes // PER_WORD), codes))
            for r in range(made.height):
                with T.If(inner + i64(r) < i64(made.geometry.outputs)), T.Then():
                    if not self.out:
                        one = tirx.Shuffle([value], [r])
                        T.buffer_store(buffers["out"], one, [image, first + i64(r), place])
                    elif r % PER_WORD == 0:
                        one = _flipped(tirx.Shuffle([packed], [r // PER_WORD]), self.dot, 1)
                        word = tirx.floordiv(first, i64(PER_WORD)) + i64(r // PER_WORD)
                        T.buffer_store(buffers["out"], one, [image, word, place])

    def _residual(
        self, buffers: dict[str, Any], image: Any, word: Any, where: Any, lanes: int, k: int
    ) -> Any:
        """The ``k``-th byte of the residual's words, int32."""
        if not self.residual:
            return None
        return _byte(_flipped(buffers["residual"][image, word, where], self.dot, lanes), k, lanes)

    def _value(self, total: Any, factor: Any, bias: Any, byte: Any, lanes: int) -> Any:
        """Floats of sums, or codes less the zero point and more :data:`_WHOLE_BITS`, int32."""
        unit = self.out.scale if self.out else 1.0

        def number(x: float) -> Any:
            return spread(tirx.const(x, "float32"), lanes)

        value = total.astype(vector("float32", lanes)) * factor + bias
        if self.middle:
            rounded = tirx.nearbyint(_limited(value, *_bounds(self.middle), lanes))
            value = rounded * number(self.middle.scale / unit)
        if self.residual:
            per = self.residual.scale / unit
            value = value + number(-self.residual.zero * per)
            value = value + byte.astype(vector("float32", lanes)) * number(per)
        low, high = (None if limit is None else limit / unit for limit in (self.low, self.high))
        if not self.out:
            return _limited(value, low, high, lanes)
        least, most = _bounds(self.out)
        least = least if low is None else min(max(low, least), most)
        most = most if high is None else max(min(high, most), least)
        whole = _limited(value, least, most, lanes) + number(_WHOLE)
        return tirx.reinterpret(vector("int32", lanes), whole)


@dataclasses.dataclass(frozen=True)
class SeparateCodes(Codes):
    """Codes of which each channel is convolved by itself.

    A dot product over channels would be wasted on it, so the four channels of a word are arranged
    as floats, near the core that uses them. Sums of so few products of codes are exact as floats.
    """

    dtype: ClassVar[str] = "float32"
    planes: ClassVar[int] = PER_WORD

    @property
    def border(self) -> int:
        """The input's zero point."""
        return self.x.zero

    def read(self, values: Any, lanes: int, plane: int) -> Any:
        """One of the bytes."""
        byte = _byte(_flipped(values, self.dot, lanes), plane, lanes)
        return byte.astype(vector("float32", lanes))

    def packed_shape(self, made: Plan) -> tuple[int, int, int]:
        """As it was packed."""
        return made.packed_shape

    def parameters(self, made: Plan, batch: Any) -> dict[str, tuple[tuple[Any, ...], str]]:
        """As those of the others; ``start`` is float32."""
        kinds = super().parameters(made, batch)
        return {**kinds, "start": (kinds["start"][0], "float32")}

    def add(self, total: Any, values: Any, factor: Any, lanes: int) -> Any:
        """A multiplication and an addition."""
        return total + factor * values


@dataclasses.dataclass(frozen=True)
class Largest(Terms):
    """The largest of the window, for each byte of a word; without weights."""

    dot: Dot
    dtype: ClassVar[str] = "int32"
    given: ClassVar[str] = "int32"
    weighted: ClassVar[bool] = False

    @property
    def border(self) -> int:
        """The smallest code."""
        return word_of(0, self.dot)

    def parameters(self, made: Plan, batch: Any) -> dict[str, tuple[tuple[Any, ...], str]]:
        """The result."""
        g = made.geometry
        return {"out": ((batch, g.outputs, g.out[0] * g.out[1]), "int32")}

    def first(self, buffers: dict[str, Any], channel: Any, lanes: int) -> Any:
        """The smallest."""
        return spread(tirx.const(self.border, "int32"), lanes)

    def add(self, total: Any, values: Any, factor: Any, lanes: int) -> Any:
        """The larger of two, byte by byte."""
        kind = vector("int8" if self.dot.signed else "uint8", PER_WORD * lanes)
        larger = tirx.max(tirx.reinterpret(kind, total), tirx.reinterpret(kind, values))
        return tirx.reinterpret(vector("int32", lanes), larger)

    def store(
        self, made: Plan, buffers: dict[str, Any], at: Any, sums: list[list[Any]], places: list[Any]
    ) -> None:
        """Vectors of words."""
        image, first, _ = at
        for total, place in zip(sums[0], places, strict=True):
            T.buffer_store(buffers["out"], total, [image, first, span(place, made.lanes)])

    def store_corner(
        self, made: Plan, buffers: dict[str, Any], at: Any, totals: list[Any], places: list[Any]
    ) -> None:
        """There is none."""
        raise NotImplementedError


def plan(geometry: Geometry, dot: Dot, registers: int) -> Plan | None:
    """How to compute it; ``geometry`` counts channels, not words. None: there is no kernel.

    Its channels are summed, or each is convolved by itself (:func:`separate`).
    """
    words = -(-geometry.channels // PER_WORD)
    outputs = geometry.outputs + -geometry.outputs % PER_WORD
    inner = dataclasses.replace(geometry, channels=words, outputs=outputs)
    if geometry.groups == 1:
        return convolution_plan.plan(inner, dot.lanes, registers, PER_WORD)
    if not separate(geometry) or geometry.taps * MOST * 128 >= _EXACT:
        return None
    inner = dataclasses.replace(inner, groups=words)
    made = convolution_plan.plan(inner, dot.lanes, registers // 2, PER_WORD)
    if made is None or made.arranged.as_given:
        return None
    return dataclasses.replace(made, corner=0)


def separate(geometry: Geometry) -> bool:
    """Whether each channel is convolved by itself, to one of the result."""
    return 1 < geometry.groups == geometry.channels == geometry.outputs


def largest_plan(geometry: Geometry, dot: Dot, registers: int) -> Plan | None:
    """How to compute the largest of windows; ``geometry`` counts words, each a group by itself."""
    made = convolution_plan.plan(geometry, dot.lanes, registers)
    return dataclasses.replace(made, height=1, wide=1, corner=0) if made else None


def padded(made: Plan) -> int:
    """Elements of what there is for each output channel, with room for a vector behind them."""
    return made.packed_shape[0] * made.height + made.lanes


def pack(weights: np.ndarray, made: Plan) -> np.ndarray:
    """Codes ``int8[outputs, channels, *window]`` as words, int32 of :meth:`Codes.packed_shape`.

    Where channels are convolved by themselves: ``int8[outputs, 1, *window]`` as float32.
    """
    g = made.geometry
    outputs, channels = weights.shape[:2]
    if g.groups > 1:
        missing = ((0, g.outputs - outputs), *((0, 0),) * (weights.ndim - 1))
        return convolution_plan.pack(np.pad(weights.astype(np.float32), missing), made)
    missing = ((0, g.outputs - outputs), (0, PER_WORD * g.channels - channels), (0, 0))
    codes = np.pad(weights.reshape(outputs, channels, -1), missing)
    codes = codes.reshape(g.outputs, g.channels, PER_WORD, -1).transpose(0, 1, 3, 2)
    words = np.ascontiguousarray(codes).view(np.int32)[..., 0]
    room = -(-made.lanes // made.height) - 1
    return np.pad(convolution_plan.pack(words, made), ((0, 0), (0, room), (0, 0)))


def starts(weights: np.ndarray, zero: int, made: Plan, dot: Dot) -> np.ndarray:
    """What sums start from so that the input's zero point counts as nothing, of their dtype."""
    sums = weights.reshape(len(weights), -1).sum(1, dtype=np.int64)
    alone = made.geometry.groups > 1
    given = sums * ((128 if dot.signed and not alone else 0) - zero)
    given = given.astype(np.float32 if alone else np.int32)
    return np.pad(given, (0, padded(made) - len(given)))


def word_of(code: int, dot: Dot) -> int:
    """A code in each byte of a word."""
    byte = code ^ 0x80 if dot.signed else code
    return int(np.array([byte] * PER_WORD, np.uint8).view(np.int32)[0])


def _flipped(word: Any, dot: Dot, lanes: int) -> Any:
    """Codes as the dot product takes them, or back."""
    if not dot.signed:
        return word
    return tirx.bitwise_xor(word, spread(tirx.const(_FLIP, "int32"), lanes))


def _byte(word: Any, k: int, lanes: int) -> Any:
    """The ``k``-th byte of words, int32."""
    shifted = tirx.shift_right(word, spread(tirx.const(8 * k, "int32"), lanes)) if k else word
    return tirx.bitwise_and(shifted, spread(tirx.const(MOST, "int32"), lanes))


def _word(values: list[Any], zero: int, dot: Dot, lanes: int) -> Any:
    """Words of the codes of four channels, which come less ``zero``, more :data:`_WHOLE_BITS`."""
    total, more = values[0], 0
    for k, value in enumerate(values):
        more += (_WHOLE_BITS - zero) << 8 * k
        if k:
            total = total + tirx.shift_left(value, spread(tirx.const(8 * k, "int32"), lanes))
    wrapped = (more + (1 << 31)) % (1 << 32) - (1 << 31)
    return _flipped(total - spread(tirx.const(wrapped, "int32"), lanes), dot, lanes)


def _bounds(to: Rounding) -> tuple[float, float]:
    """Of codes less their zero point; rounding to even ones, as ONNX does, stays within."""
    return float(-to.zero), float(MOST - to.zero)


def _limited(value: Any, low: float | None, high: float | None, lanes: int) -> Any:
    for limit, choose in ((low, tirx.max), (high, tirx.min)):
        if limit is not None:
            value = choose(value, spread(tirx.const(limit, "float32"), lanes))
    return value
