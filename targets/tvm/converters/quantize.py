"""Quantized tensors: ``QuantizeLinear``, ``DequantizeLinear`` (per tensor, axis and block)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
from tvm import tirx

from hal.targets.tvm.converters import small_floats
from hal.targets.tvm.converters.cast import wrap_bits
from hal.targets.tvm.converters.elementwise import elementwise
from hal.targets.tvm.converters.reduce import fold
from hal.targets.tvm.dims import Refused
from hal.targets.tvm.dtypes import (
    BITS,
    FLOATS,
    SMALL_FLOATS,
    SMALL_INTEGERS,
    STORED_AS,
    UNSIGNED,
)
from hal.targets.tvm.lowering import Op, Operand

_D = ir.DataType
_RANGES = {
    _D.UINT8: (0, 255),
    _D.INT8: (-128, 127),
    _D.UINT16: (0, 65535),
    _D.INT16: (-32768, 32767),
    _D.UINT4: (0, 15),
    _D.INT4: (-8, 7),
    _D.UINT2: (0, 3),
    _D.INT2: (-2, 1),
}


def _parameter_index(op: Op, x: Operand, scale: Operand, i: Sequence[Any]) -> list[Any]:
    """Where the scale (or zero point) of the element at ``i`` is."""
    if scale.rank == 0 or (scale.rank == 1 and scale.shape[0] == 1 and x.rank != 1):
        return [tirx.const(0, "int64")] * scale.rank
    axis = op.axis(1, x.rank) if x.rank > 1 else 0
    block = op.attribute("block_size", 0)
    if block:
        return [tirx.floordiv(k, block) if a == axis else k for a, k in enumerate(i)]
    if scale.rank != 1:
        raise Refused("a scale of this rank without block_size")
    return [i[axis] if scale.shape[0] != 1 else tirx.const(0, "int64")]


def dequantize_linear(op: Op) -> Operand:
    """``DequantizeLinear``: ``(x - zero_point) * scale``."""
    x, scale, zero = op.input(0), op.input(1), op.optional(2)
    to = op.attribute("output_dtype", 0)
    dtype = _D(to) if to else scale.dtype
    if scale.dtype not in FLOATS or dtype not in FLOATS:
        raise Refused(f"DequantizeLinear with scales of {scale.dtype.name}")
    floating = x.dtype in SMALL_FLOATS
    values = small_floats.decode(op, x) if floating else x
    operands = [values, scale]
    if zero is not None:
        operands.append(small_floats.decode(op, zero) if zero.dtype in SMALL_FLOATS else zero)
    middle = "float32" if floating else "int32"

    def body(v: Any, s: Any, *rest: Any) -> Any:
        *zeros, i = rest
        at = _parameter_index(op, x, scale, i)
        value = v(*i).astype(middle)
        if zeros:
            value = value - zeros[0](*_parameter_index(op, x, operands[2], i)).astype(middle)
        return (value.astype("float32") * s(*at).astype("float32")).astype(STORED_AS[dtype])

    return op.compute(x.shape, body, *operands, dtype=dtype)


def quantize_linear(op: Op) -> Operand:
    """``QuantizeLinear``: ``saturate(round(x / scale) + zero_point)``."""
    x, scale, zero = op.input(0), op.input(1), op.optional(2)
    to = op.attribute("output_dtype", 0)
    dtype = zero.dtype if zero is not None else (_D(to) if to else _D.UINT8)
    if x.dtype not in FLOATS | {_D.INT32} or scale.dtype not in FLOATS:
        raise Refused(f"QuantizeLinear of {x.dtype.name} with scales of {scale.dtype.name}")
    operands = [x, scale]
    if zero is not None:
        operands.append(small_floats.decode(op, zero) if dtype in SMALL_FLOATS else zero)

    def scaled(v: Any, s: Any, i: Any) -> Any:
        at = _parameter_index(op, x, scale, i)
        if x.dtype is _D.FLOAT16:  # the quotient is rounded to the precision of the input
            return (v(*i) / s(*at).astype("float16")).astype("float32")
        return v(*i).astype("float32") / s(*at).astype("float32")

    if dtype in SMALL_FLOATS:
        if zero is not None and zero.expr is None:
            raise Refused("QuantizeLinear to small floats with a zero point")

        def quotient(v: Any, s: Any, *rest: Any) -> Any:
            *zeros, i = rest
            value = scaled(v, s, i)
            if zeros:
                value = value + zeros[0](*_parameter_index(op, x, operands[2], i)).astype("float32")
            return value

        wide = op.compute(x.shape, quotient, *operands, dtype=_D.FLOAT)
        return small_floats.encode(op, wide, dtype, saturate=bool(op.attribute("saturate", 1)))
    if dtype not in _RANGES:
        raise Refused(f"QuantizeLinear to {dtype.name}")
    low, high = (tirx.const(float(v), "float32") for v in _RANGES[dtype])

    def body(v: Any, s: Any, *rest: Any) -> Any:
        *zeros, i = rest
        value = tirx.nearbyint(scaled(v, s, i))
        if zeros:
            value = value + zeros[0](*_parameter_index(op, x, operands[2], i)).astype("float32")
        limited = tirx.max(tirx.min(value, high), low).astype("int32")
        return limited.astype(STORED_AS[dtype])

    return op.compute(x.shape, body, *operands, dtype=dtype)


def dynamic_quantize_linear(op: Op) -> list[Operand]:
    """``DynamicQuantizeLinear`` to uint8 with a scale and zero point found from the data."""
    x = op.require(0, frozenset({_D.FLOAT}))
    axes = list(range(x.rank))
    zero = tirx.const(0.0, "float32")
    high = fold(op, x, axes, tirx.max, lambda d: tirx.const(0, d), keep=False)
    low = fold(op, x, axes, tirx.min, lambda d: tirx.const(0, d), keep=False)
    scale = elementwise(op, lambda h, m: (h - m) / tirx.const(255.0, "float32"), [high, low])

    def point(m: Any, s: Any) -> Any:
        value = tirx.nearbyint(zero - m / s)
        return (
            tirx.max(tirx.min(value, tirx.const(255.0, "float32")), zero)
            .astype("int32")
            .astype("uint8")
        )

    zero_point = elementwise(op, point, [low, scale], _D.UINT8)

    def quantized(v: Any, s: Any, z: Any) -> Any:
        value = tirx.nearbyint(v / s) + z.astype("float32")
        return (
            tirx.max(tirx.min(value, tirx.const(255.0, "float32")), zero)
            .astype("int32")
            .astype("uint8")
        )

    y = elementwise(op, quantized, [x, scale, zero_point], _D.UINT8)
    return [y, scale, zero_point]


CONVERTERS: dict[str, Callable[[Op], Any]] = {
    "QuantizeLinear": quantize_linear,
    "DequantizeLinear": dequantize_linear,
    "DynamicQuantizeLinear": dynamic_quantize_linear,
}
"""Converters of this family by op type."""

__all__ = ["BITS", "CONVERTERS", "SMALL_INTEGERS", "UNSIGNED", "wrap_bits"]
