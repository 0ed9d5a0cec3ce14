"""ONNX dtypes by kind, and how they are stored in TVM tensors (:mod:`.storage`)."""

from __future__ import annotations

import onnx_ir as ir

from hal.targets.tvm import storage

_D = ir.DataType

STORED_AS: dict[ir.DataType, str] = {
    ir.DataType[name]: kind for name, kind in storage.STORED_AS.items()
}
"""dtype of the TVM tensor that holds values of an ONNX dtype."""

FLOATS = frozenset({_D.FLOAT, _D.DOUBLE, _D.FLOAT16, _D.BFLOAT16})
SIGNED = frozenset({_D.INT8, _D.INT16, _D.INT32, _D.INT64})
UNSIGNED = frozenset({_D.UINT8, _D.UINT16, _D.UINT32, _D.UINT64})
INTEGERS = SIGNED | UNSIGNED
NUMBERS = FLOATS | INTEGERS
PLAIN = NUMBERS | {_D.BOOL}
SMALL_FLOATS = frozenset(ir.DataType[name] for name in storage.SMALL_FLOATS)
SMALL_INTEGERS = frozenset(ir.DataType[name] for name in storage.SMALL_INTEGERS)
BITS = {dtype: dtype.bitwidth for dtype in SMALL_INTEGERS}


def plain(dtype: str) -> ir.DataType:
    """The ONNX dtype that a TVM dtype stands for when nothing else is said."""
    return _PLAIN_BY_NAME[dtype]


_PLAIN_BY_NAME = {STORED_AS[d]: d for d in PLAIN}
