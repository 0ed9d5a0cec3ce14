"""Floats of 8 and 4 bits as raw bits in uint8: decoding by table, encoding with rounding.

Formats and the rules for overflow and NaN are those of ONNX's ``Cast``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import tirx

from hal.targets.tvm.dims import Refused
from hal.targets.tvm.dtypes import SMALL_FLOATS
from hal.targets.tvm.lowering import Op, Operand


@dataclasses.dataclass(frozen=True)
class _Format:
    """Layout of a small float. Codes are without the sign bit."""

    mantissa: int
    smallest_exponent: int
    largest_code: int
    overflow_code: int
    nan_code: int
    sign_bit: int
    unsigned_zero: bool = False


_D = ir.DataType
_FORMATS = {
    _D.FLOAT8E4M3FN: _Format(3, -6, 0x7E, 0x7F, 0x7F, 7),
    _D.FLOAT8E5M2: _Format(2, -14, 0x7B, 0x7C, 0x7F, 7),
    _D.FLOAT8E4M3FNUZ: _Format(3, -7, 0x7F, 0x80, 0x80, 7, unsigned_zero=True),
    _D.FLOAT8E5M2FNUZ: _Format(2, -15, 0x7F, 0x80, 0x80, 7, unsigned_zero=True),
    _D.FLOAT4E2M1: _Format(1, 0, 0x7, 0x7, 0x7, 3),
}


def decode(op: Op, x: Operand) -> Operand:
    """Values of a small-float tensor as float32."""
    assert x.dtype in SMALL_FLOATS
    codes = 16 if x.dtype is _D.FLOAT4E2M1 else 256
    bits = np.arange(codes, dtype=np.uint8)
    table = op.context.embed(bits.view(x.dtype.numpy()).astype(np.float32))
    return op.compute(
        x.shape, lambda v, t, i: t[v(*i).astype("int64")], x, table, dtype=_D.FLOAT
    )


def encode(op: Op, x: Operand, to: ir.DataType, *, saturate: bool, round_mode: str = "up") -> Operand:
    """float32 values as codes of ``to``."""
    if to is _D.FLOAT8E8M0:
        return op.compute(x.shape, lambda v, i: _exponent_only(v(*i), saturate, round_mode), x, dtype=to)
    if to not in _FORMATS:
        raise Refused(f"conversion to {to.name} is not implemented")
    layout = _FORMATS[to]
    return op.compute(x.shape, lambda v, i: _encode(v(*i), layout, saturate), x, dtype=to)


def _u32(value: int) -> Any:
    return tirx.const(value, "uint32")


def _encode(value: Any, layout: _Format, saturate: bool) -> Any:
    bits = tirx.reinterpret("uint32", value)
    magnitude_bits = tirx.bitwise_and(bits, _u32(0x7FFFFFFF))
    sign = tirx.shift_right(bits, _u32(31))
    exponent = tirx.shift_right(magnitude_bits, _u32(23)).astype("int32") - 127
    lowest = tirx.const(layout.smallest_exponent, "int32")
    exponent = tirx.min(tirx.max(exponent, lowest), tirx.const(120, "int32"))
    inverse = tirx.reinterpret(
        "float32", tirx.shift_left((layout.mantissa - exponent + 127).astype("uint32"), _u32(23))
    )
    steps = tirx.nearbyint(tirx.reinterpret("float32", magnitude_bits) * inverse)
    steps = tirx.min(steps, tirx.const(float(1 << (layout.mantissa + 1)), "float32"))
    code = (exponent - lowest) * (1 << layout.mantissa) + steps.astype("int32")
    largest = tirx.const(layout.largest_code, "int32")
    beyond = tirx.const(layout.largest_code if saturate else layout.overflow_code, "int32")
    too_big = tirx.Or(code > largest, magnitude_bits >= _u32(0x7F800000))
    code = tirx.Select(too_big, beyond, code)
    signed = tirx.bitwise_or(code, tirx.shift_left(sign.astype("int32"), tirx.const(layout.sign_bit, "int32")))
    if layout.unsigned_zero:
        signed = tirx.Select(code == 0, code, signed)
    nan = tirx.const(layout.nan_code, "int32")
    if layout.nan_code == 0x7F:
        nan = tirx.bitwise_or(nan, tirx.shift_left(sign.astype("int32"), tirx.const(7, "int32")))
    return tirx.Select(magnitude_bits > _u32(0x7F800000), nan, signed).astype("uint8")


def _exponent_only(value: Any, saturate: bool, round_mode: str) -> Any:
    """Code of an E8M0 scale: the exponent of ``value``, rounded as ``round_mode`` says."""
    bits = tirx.bitwise_and(tirx.reinterpret("uint32", value), _u32(0x7FFFFFFF))
    exponent = tirx.shift_right(bits, _u32(23)).astype("int32")
    mantissa = tirx.bitwise_and(bits, _u32(0x7FFFFF))
    if round_mode == "up":
        up = mantissa > _u32(0)
    elif round_mode == "nearest":
        up = mantissa >= _u32(0x400000)
    else:
        up = tirx.const(False, "bool")
    rounded = exponent + up.astype("int32")
    largest = tirx.const(254, "int32")
    beyond = tirx.const(254 if saturate else 255, "int32")
    code = tirx.Select(rounded > largest, beyond, rounded)
    return tirx.Select(bits > _u32(0x7F800000), tirx.const(255, "int32"), code).astype("uint8")


def to_bfloat16(value: Any) -> Any:
    """A float32 rounded to the nearest bfloat16, ties to even."""
    return value.astype("bfloat16")
