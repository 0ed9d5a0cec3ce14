"""Arrays of any ONNX dtype to and from ONNX Runtime values, without copies where possible.

ONNX Runtime's own conversions know numpy's dtypes only; here bfloat16, float8, int4 and the
others (ml_dtypes) pass too, and what comes out is a view of the runtime's memory.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

Array = Any
"""A tensor: ``numpy.ndarray``, a value of ONNX Runtime, or any object that speaks DLPack."""


def as_numpy(array: Array) -> np.ndarray:
    """View a tensor as numpy (bfloat16 and float8 too), copying only what is not in host memory.

    Raises:
        TypeError: the object is neither an array nor a DLPack tensor.
    """
    if isinstance(array, np.ndarray):
        return array
    if isinstance(array, ort.OrtValue):
        return np.asarray(from_ort(array))
    if hasattr(array, "__dlpack__"):
        if getattr(array, "requires_grad", False):
            array = array.detach()
        try:
            return np.from_dlpack(array)
        except (BufferError, RuntimeError, TypeError):
            return _foreign_dtype(array)
    return np.asarray(array)


def _foreign_dtype(array: Array) -> np.ndarray:
    """Numpy refuses DLPack's bfloat16 and float8: reinterpret through bytes of equal width."""
    value = ort.OrtValue.from_dlpack(array.contiguous() if hasattr(array, "contiguous") else array)
    result = from_ort(value)
    if not isinstance(result, np.ndarray):
        raise TypeError(f"cannot view {type(array).__name__} as an array")
    return result


def to_ort(array: Array) -> ort.OrtValue:
    """Wrap a tensor; the value refers to the array's memory where layout and dtype allow.

    Raises:
        TypeError: the dtype is no ONNX dtype, or one that the runtime does not wrap (strings).
    """
    if isinstance(array, ort.OrtValue):
        return array
    data = as_numpy(array)
    if data.dtype.kind in "OUSc":
        raise TypeError(f"{data.dtype} tensors cannot be wrapped by onnxruntime")
    data = np.ascontiguousarray(data) if data.ndim else data
    dtype = ir.DataType.from_numpy(data.dtype)
    if dtype.bitwidth < 8:
        packed = np.frombuffer(ir.Tensor(data, dtype=dtype).tobytes(), np.uint8)
        return from_packed(packed, dtype, data.shape)
    if data.dtype.isbuiltin == 1:
        return ort.OrtValue.ortvalue_from_numpy(data)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(data, dtype.value)


def from_ort(value: ort.OrtValue) -> Any:
    """The value as numpy: a view of its memory for tensors, a list for sequences, or None."""
    if not value.has_value():
        return None
    if value.is_tensor_sequence() or not value.is_tensor():
        return value.numpy()
    if value.data_type() == "tensor(string)":
        return value.numpy()
    dtype = ir.DataType(value.element_type())
    shape = tuple(value.shape())
    if 0 in shape:
        return np.empty(shape, dtype.numpy())
    size = value.tensor_size_in_bytes()
    memory = (ctypes.c_uint8 * size).from_address(value.data_ptr())
    memory._owner = value  # the view keeps the runtime's value alive
    raw = np.frombuffer(memory, np.uint8)
    if dtype.bitwidth < 8:
        return _unpacked(raw, dtype, shape)
    return raw.view(dtype.numpy()).reshape(shape)


def from_packed(packed: np.ndarray, dtype: ir.DataType, shape: tuple[int, ...]) -> ort.OrtValue:
    """A value over elements of less than a byte as ONNX packs them, uint8, contiguous.

    The runtime takes the element count from the shape and reads only the packed bytes, so the
    array that it is given reaches beyond them; nothing else may read it.
    """
    count = int(np.prod(shape))
    if not count:
        empty = np.empty(shape, dtype.numpy())
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(empty, dtype.value)
    memory: Any = (ctypes.c_uint8 * count).from_address(packed.ctypes.data)
    memory._owner = packed  # the array keeps the bytes alive
    data = np.frombuffer(memory, dtype.numpy()).reshape(shape)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(data, dtype.value)


def _unpacked(raw: np.ndarray, dtype: ir.DataType, shape: tuple[int, ...]) -> np.ndarray:
    per_byte = 8 // dtype.bitwidth
    mask = (1 << dtype.bitwidth) - 1
    shifts = np.arange(per_byte, dtype=np.uint8) * dtype.bitwidth
    codes = ((raw[:, None] >> shifts) & mask).reshape(-1)[: int(np.prod(shape))]
    if dtype.is_signed() and dtype.is_integer():
        sign = np.uint8(1 << (dtype.bitwidth - 1))
        codes = ((codes ^ sign).astype(np.int16) - int(sign)).astype(np.int8)
        return codes.astype(dtype.numpy()).reshape(shape)
    if dtype.is_integer():
        return codes.astype(dtype.numpy()).reshape(shape)
    return codes.astype(np.uint8).view(dtype.numpy()).reshape(shape)
