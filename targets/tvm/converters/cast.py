"""Conversions between dtypes: ``Cast``, ``CastLike``, ``BitCast``, ``Constant``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import tirx

from hal.targets.tvm.converters import small_floats
from hal.targets.tvm.converters.elementwise import elementwise
from hal.targets.tvm.dims import Refused
from hal.targets.tvm.dtypes import (
    BITS,
    FLOATS,
    INTEGERS,
    SMALL_FLOATS,
    SMALL_INTEGERS,
    STORED_AS,
    UNSIGNED,
)
from hal.targets.tvm.lowering import Op, Operand


def cast(op: Op) -> Operand:
    """``Cast`` to the dtype of the attribute ``to``."""
    return convert(op, op.input(0), ir.DataType(op.attribute("to")))


def cast_like(op: Op) -> Operand:
    """``CastLike``: to the dtype of the second input."""
    return convert(op, op.input(0), op.input(1).dtype)


def convert(op: Op, x: Operand, to: ir.DataType) -> Operand:
    """``x`` as dtype ``to`` by the rules of ``Cast`` (attributes ``saturate``, ``round_mode``)."""
    if to not in STORED_AS:
        raise Refused(f"cast to {to.name} is not implemented")
    if x.dtype == to:
        return x
    if x.content is not None:
        known = _content(x, to)
        if known is not None:
            return known
    if x.dtype in SMALL_FLOATS:
        x = small_floats.decode(op, x)
    if to in SMALL_FLOATS:
        wide = elementwise(op, lambda v: v.astype("float32"), [x], ir.DataType.FLOAT)
        saturate = bool(op.attribute("saturate", 1))
        mode = op.attribute("round_mode", "up")
        return small_floats.encode(op, wide, to, saturate=saturate, round_mode=mode)
    if x.dtype == to:
        return x
    return elementwise(op, lambda v: _plain(v, x.dtype, to), [x], to)


def _content(x: Operand, to: ir.DataType) -> Operand | None:
    """Casts that keep the elements known: between integers wide enough for extents."""
    if to in (ir.DataType.INT64, ir.DataType.INT32) and x.dtype in (
        ir.DataType.INT64,
        ir.DataType.INT32,
    ):
        if to is ir.DataType.INT32:
            assert x.content is not None
            if any(isinstance(i, int) and not -(2**31) <= i < 2**31 for i in x.content.flat):
                return None
        return Operand(to, x.shape, None, x.content)
    return None


def _plain(value: Any, source: ir.DataType, to: ir.DataType) -> Any:
    stored = STORED_AS[to]
    if to is ir.DataType.BOOL:
        return value != tirx.const(0, STORED_AS[source])
    if to in SMALL_INTEGERS:
        wide = value.astype("int32") if source not in FLOATS else _to_int(value, source, "int64")
        return wrap_bits(wide.astype("int32"), to)
    if source in FLOATS and to in INTEGERS:
        return _to_int(value, source, stored)
    if source is ir.DataType.BOOL and to in FLOATS:
        return value.astype("int32").astype(stored)
    if source is ir.DataType.FLOAT and to is ir.DataType.BFLOAT16:
        return small_floats.to_bfloat16(value)
    if source in FLOATS and to in FLOATS and ir.DataType.BFLOAT16 in (source, to):
        middle = value.astype("float32")
        return (
            small_floats.to_bfloat16(middle)
            if to is ir.DataType.BFLOAT16
            else middle.astype(stored)
        )
    if to is ir.DataType.BFLOAT16:
        return small_floats.to_bfloat16(value.astype("float32"))
    return value.astype(stored)


def _to_int(value: Any, source: ir.DataType, stored: str) -> Any:
    wide = (
        value.astype("float32") if source in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) else value
    )
    if stored in ("int64", "uint64"):
        return wide.astype(stored)
    return wide.astype("int64").astype(stored)


def wrap_bits(value: Any, to: ir.DataType) -> Any:
    """The low bits of an int32 as a small integer in its storage dtype."""
    bits = BITS[to]
    low = tirx.bitwise_and(value, tirx.const((1 << bits) - 1, "int32"))
    if to in (ir.DataType.UINT4, ir.DataType.UINT2):
        return low.astype("uint8")
    half = tirx.const(1 << (bits - 1), "int32")
    return (tirx.bitwise_xor(low, half) - half).astype("int8")


def bit_cast(op: Op) -> Operand:
    """``BitCast`` between dtypes of the same width."""
    x, to = op.input(0), ir.DataType(op.attribute("to"))
    if to not in STORED_AS or x.dtype.bitwidth != to.bitwidth or x.dtype.bitwidth < 8:
        raise Refused(f"BitCast from {x.dtype.name} to {to.name} is not implemented")
    if ir.DataType.BOOL in (x.dtype, to):
        return elementwise(op, lambda v: v.astype(STORED_AS[to]), [x], to)
    if STORED_AS[to] == x.stored:
        return Operand(to, x.shape, op.context.expr(x))
    return elementwise(op, lambda v: tirx.reinterpret(STORED_AS[to], v), [x], to)


def constant(op: Op) -> Operand:
    """``Constant`` in each of its spellings."""
    value = op.node.outputs[0].const_value
    if value is not None:
        return op.context.embed(value.numpy(), value.dtype)
    for name in ("value", "value_int", "value_float", "value_ints", "value_floats"):
        attr = op.attribute(name)
        if attr is None:
            continue
        if name == "value":
            return op.context.embed(attr.numpy(), attr.dtype)
        dtype = np.int64 if "int" in name else np.float32
        return op.context.embed(np.array(attr, dtype))
    raise Refused("a constant that is no tensor of numbers")


def is_unsigned(dtype: ir.DataType) -> bool:
    """Whether values of ``dtype`` are never negative."""
    return dtype in UNSIGNED or dtype in (ir.DataType.UINT4, ir.DataType.UINT2)


CONVERTERS: dict[str, Callable[[Op], Any]] = {
    "Cast": cast,
    "CastLike": cast_like,
    "BitCast": bit_cast,
    "Constant": constant,
}
"""Converters of this family by op type."""
