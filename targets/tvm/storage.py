"""How values of ONNX dtypes, by name, are stored in TVM tensors.

Numbers that compilers handle (floats of 16 to 64 bits, bfloat16, integers of 8 bits and more,
bool) are themselves. The smaller ones are stored one to a byte, as raw bits for floats, and are
decoded where arithmetic needs them (:mod:`.converters.small_floats`).
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

STORED_AS: dict[str, str] = {
    "FLOAT": "float32",
    "DOUBLE": "float64",
    "FLOAT16": "float16",
    "BFLOAT16": "bfloat16",
    "BOOL": "bool",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "UINT16": "uint16",
    "UINT32": "uint32",
    "UINT64": "uint64",
    "INT4": "int8",
    "INT2": "int8",
    "UINT4": "uint8",
    "UINT2": "uint8",
    "FLOAT8E4M3FN": "uint8",
    "FLOAT8E4M3FNUZ": "uint8",
    "FLOAT8E5M2": "uint8",
    "FLOAT8E5M2FNUZ": "uint8",
    "FLOAT8E8M0": "uint8",
    "FLOAT4E2M1": "uint8",
}
"""dtype of the TVM tensor that holds values of an ONNX dtype."""

SMALL_FLOATS: dict[str, type] = {
    "FLOAT8E4M3FN": ml_dtypes.float8_e4m3fn,
    "FLOAT8E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "FLOAT8E5M2": ml_dtypes.float8_e5m2,
    "FLOAT8E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "FLOAT8E8M0": ml_dtypes.float8_e8m0fnu,
    "FLOAT4E2M1": ml_dtypes.float4_e2m1fn,
}
"""Floats of less than 16 bits as numpy has them."""

SMALL_INTEGERS: dict[str, type] = {
    "INT4": ml_dtypes.int4,
    "INT2": ml_dtypes.int2,
    "UINT4": ml_dtypes.uint4,
    "UINT2": ml_dtypes.uint2,
}
"""Integers of less than 8 bits as numpy has them."""

PACKED_BITS = {"INT4": 4, "INT2": 2, "UINT4": 4, "UINT2": 2, "FLOAT4E2M1": 4}
"""Bits of the dtypes of which ONNX packs several into a byte."""


def to_storage(array: np.ndarray, dtype: str) -> np.ndarray:
    """The array of dtype ``STORED_AS[dtype]`` that holds ``array``; a view where possible."""
    stored = STORED_AS[dtype]
    if dtype in SMALL_FLOATS:
        return np.ascontiguousarray(array).view(np.uint8)
    if array.dtype.name != stored:
        return array.astype(stored)
    return array


def from_storage(array: np.ndarray, dtype: str) -> np.ndarray:
    """Inverse of :func:`to_storage`."""
    if dtype in SMALL_FLOATS:
        return array.view(SMALL_FLOATS[dtype])
    if dtype in SMALL_INTEGERS:
        return array.astype(SMALL_INTEGERS[dtype])
    return array
