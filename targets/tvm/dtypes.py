"""How ONNX dtypes are stored in TVM tensors.

Numbers that compilers handle (floats of 16 to 64 bits, bfloat16, integers of 8 bits and more,
bool) are themselves. The smaller ones are stored one to a byte, as raw bits for floats, and are
decoded where arithmetic needs them (:mod:`.converters.small_floats`).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

_D = ir.DataType

STORED_AS: dict[ir.DataType, str] = {
    _D.FLOAT: "float32",
    _D.DOUBLE: "float64",
    _D.FLOAT16: "float16",
    _D.BFLOAT16: "bfloat16",
    _D.BOOL: "bool",
    _D.INT8: "int8",
    _D.INT16: "int16",
    _D.INT32: "int32",
    _D.INT64: "int64",
    _D.UINT8: "uint8",
    _D.UINT16: "uint16",
    _D.UINT32: "uint32",
    _D.UINT64: "uint64",
    _D.INT4: "int8",
    _D.INT2: "int8",
    _D.UINT4: "uint8",
    _D.UINT2: "uint8",
    _D.FLOAT8E4M3FN: "uint8",
    _D.FLOAT8E4M3FNUZ: "uint8",
    _D.FLOAT8E5M2: "uint8",
    _D.FLOAT8E5M2FNUZ: "uint8",
    _D.FLOAT8E8M0: "uint8",
    _D.FLOAT4E2M1: "uint8",
}
"""dtype of the TVM tensor that holds values of an ONNX dtype."""

FLOATS = frozenset({_D.FLOAT, _D.DOUBLE, _D.FLOAT16, _D.BFLOAT16})
SIGNED = frozenset({_D.INT8, _D.INT16, _D.INT32, _D.INT64})
UNSIGNED = frozenset({_D.UINT8, _D.UINT16, _D.UINT32, _D.UINT64})
INTEGERS = SIGNED | UNSIGNED
NUMBERS = FLOATS | INTEGERS
PLAIN = NUMBERS | {_D.BOOL}
SMALL_FLOATS = frozenset(
    {
        _D.FLOAT8E4M3FN,
        _D.FLOAT8E4M3FNUZ,
        _D.FLOAT8E5M2,
        _D.FLOAT8E5M2FNUZ,
        _D.FLOAT8E8M0,
        _D.FLOAT4E2M1,
    }
)
SMALL_INTEGERS = frozenset({_D.INT4, _D.INT2, _D.UINT4, _D.UINT2})
BITS = {_D.INT4: 4, _D.INT2: 2, _D.UINT4: 4, _D.UINT2: 2}


def plain(dtype: str) -> ir.DataType:
    """The ONNX dtype that a TVM dtype stands for when nothing else is said."""
    return _PLAIN_BY_NAME[dtype]


_PLAIN_BY_NAME = {STORED_AS[d]: d for d in PLAIN}


def to_storage(array: np.ndarray, dtype: ir.DataType) -> np.ndarray:
    """The array of dtype ``STORED_AS[dtype]`` that holds ``array``; a view where possible."""
    stored = STORED_AS[dtype]
    if dtype in SMALL_FLOATS:
        return np.ascontiguousarray(array).view(np.uint8)
    if array.dtype.name != stored:
        return array.astype(stored)
    return array


def from_storage(array: np.ndarray, dtype: ir.DataType) -> np.ndarray:
    """Inverse of :func:`to_storage`."""
    if dtype in SMALL_FLOATS:
        return array.view(dtype.numpy())
    if dtype in SMALL_INTEGERS:
        return array.astype(dtype.numpy())
    return array
