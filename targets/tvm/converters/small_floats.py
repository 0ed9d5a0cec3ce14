"""Floats of 8 and 4 bits as raw bits in uint8: decoding by table, encoding with rounding.

Formats and the rules for overflow and NaN are those of ONNX's ``Cast``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import te, tirx

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
    _D.FLOAT4E2M1: _Format(1, 0, 0x7, 0x7, 0x8, 3),
}


def decode(op: Op, x: Operand) -> Operand:
    """Values of a small-float tensor as float32."""
    assert x.dtype in SMALL_FLOATS
    codes = 16 if x.dtype is _D.FLOAT4E2M1 else 256
    bits = np.arange(codes, dtype=np.uint8)
    table = op.context.embed(bits.view(x.dtype.numpy()).astype(np.float32))
    return op.compute(x.shape, lambda v, t, i: t[v(*i).astype("int64")], x, table, dtype=_D.FLOAT)


def encode(
    op: Op, x: Operand, to: ir.DataType, *, saturate: bool, round_mode: str = "up"
) -> Operand:
    """float32 values as codes of ``to``."""
    if to is _D.FLOAT8E8M0:
        return op.compute(
            x.shape, lambda v, i: _exponent_only(v(*i), saturate, round_mode), x, dtype=to
        )
    if to not in _FORMATS:
        raise Refused(f"conversion to {to.name} is not implemented")
    layout = _FORMATS[to]

    def kernel(values: Any) -> Any:
        # Three stages, so that no expression is written out more than a few times.
        exponents = te.compute(x.shape, lambda *i: _exponent(values(*i), layout), name="exponents")
        codes = te.compute(
            x.shape, lambda *i: _code(values(*i), exponents(*i), layout), name="codes"
        )
        return te.compute(
            x.shape, lambda *i: _finished(values(*i), codes(*i), layout, saturate), name="encoded"
        )

    return op.te(kernel, x, dtype=to)


def _u32(value: int) -> Any:
    return tirx.const(value, "uint32")


def _magnitude(value: Any) -> Any:
    return tirx.bitwise_and(tirx.reinterpret("uint32", value), _u32(0x7FFFFFFF))


def _exponent(value: Any, layout: _Format) -> Any:
    """Exponent of the step in which ``value`` is counted."""
    exponent = tirx.shift_right(_magnitude(value), _u32(23)).astype("int32") - 127
    lowest = tirx.const(layout.smallest_exponent, "int32")
    return tirx.min(tirx.max(exponent, lowest), tirx.const(120, "int32"))


def _code(value: Any, exponent: Any, layout: _Format) -> Any:
    """Code of the magnitude, not yet limited."""
    inverse = tirx.reinterpret(
        "float32", tirx.shift_left((layout.mantissa - exponent + 127).astype("uint32"), _u32(23))
    )
    steps = tirx.nearbyint(tirx.reinterpret("float32", _magnitude(value)) * inverse)
    steps = tirx.min(steps, tirx.const(float(1 << (layout.mantissa + 1)), "float32"))
    lowest = tirx.const(layout.smallest_exponent, "int32")
    return (exponent - lowest) * (1 << layout.mantissa) + steps.astype("int32")


def _finished(value: Any, code: Any, layout: _Format, saturate: bool) -> Any:
    """Limit the code, add the sign, and treat infinity and NaN."""
    infinity = _u32(0x7F800000)
    sign = tirx.shift_right(tirx.reinterpret("uint32", value), _u32(31)).astype("int32")
    beyond = tirx.const(layout.largest_code if saturate else layout.overflow_code, "int32")
    too_big = tirx.Or(code > layout.largest_code, _magnitude(value) >= infinity)
    limited = tirx.Select(too_big, beyond, code)
    signed = tirx.bitwise_or(limited, sign * (1 << layout.sign_bit))
    if layout.unsigned_zero:
        signed = tirx.Select(limited == 0, limited, signed)
    nan = tirx.const(layout.nan_code, "int32")
    if layout.nan_code == 0x7F:
        nan = tirx.bitwise_or(nan, sign * 128)
    return tirx.Select(_magnitude(value) > infinity, nan, signed).astype("uint8")


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
