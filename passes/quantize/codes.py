"""A quantized weight: integer codes, a scale for each block, perhaps zero points.

``w[r, c] = scale[r, c // group] * (codes[r, c] - zero[r, c // group])``
"""

from __future__ import annotations

import dataclasses
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from hal.passes.quantize.formats import Format

_LARGEST_SCALE = 65504 / 2
"""Half the largest float16: searched scales go beyond the plain one."""

_SMALLEST_SCALE = 2.0**-14
"""The smallest normal float16; below, scales lose their digits."""

_IN_MEMORY = 1 << 18
"""Bytes of codes that are not worth a file."""

_FILE_BYTES = 256 << 20

_AT_ONCE = 4 << 20
"""Weights that are compared at once."""


@dataclasses.dataclass(frozen=True)
class Codes:
    """A matrix ``[R, C]`` in ``format``.

    Attributes:
        codes: int8 (symmetric), uint8, or floats of a byte each (see :mod:`.grid`) ``[R, C]``.
        scale: float16 ``[R, G]``, G blocks along C, the last one perhaps shorter; powers of two
            where the format says so.
        zero: uint8 ``[R, G]`` for asymmetric formats.
    """

    format: Format
    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None = None

    def dequantized(self) -> np.ndarray:
        """The float32 matrix ``[R, C]`` that the codes stand for."""
        values = self.codes.astype(np.float32)
        if self.zero is not None:
            values -= self.spread(self.zero.astype(np.float32))
        values *= self.spread(self.scale.astype(np.float32))
        return values

    def rows(self, part: slice) -> Codes:
        """Some of the rows."""
        zero = None if self.zero is None else self.zero[part]
        return Codes(self.format, self.codes[part], self.scale[part], zero)

    def noise(self, matrix: np.ndarray) -> float:
        """The sum of the squared differences from a float32 matrix ``[R, C]``."""
        total, step = 0.0, max(1, _AT_ONCE // matrix.shape[1])
        for start in range(0, len(matrix), step):
            part = slice(start, start + step)
            error = self.rows(part).dequantized()
            np.subtract(matrix[part], error, out=error)
            total += float(np.vdot(error, error))
        return total

    def spread(self, by_block: np.ndarray) -> np.ndarray:
        """One value per block ``[R, G]`` as one per column ``[R, C]``."""
        columns = self.codes.shape[1]
        return np.repeat(by_block, self.format.group or columns, axis=1)[:, :columns]

    @property
    def nbytes(self) -> int:
        """Bytes in the bundle."""
        rows, columns = self.codes.shape
        zeros = 0 if self.zero is None else self.zero.size * self.format.bits // 8
        scales = self.scale.size * self.format.scale_dtype.itemsize
        return int(rows * columns * self.format.bits // 8 + scales + zeros)


def no_scales(weight: np.ndarray, form: Format) -> str:
    """Why float16 has no scales for a matrix, or nothing: what it would make of it is lost."""
    if form.code == "mxfp4":  # powers of two with eight bits of exponent
        return ""
    largest = float(max(weight.max(initial=0.0), -weight.min(initial=0.0)))  # no copy of it
    scale = largest / (form.highest if form.symmetric else form.levels)
    if scale > _LARGEST_SCALE or 0 < scale < _SMALLEST_SCALE:
        return f"its numbers, up to {largest:.2g}, are too {_word(scale)} for scales of float16"
    return ""


def _word(scale: float) -> str:
    return "large" if scale > 1 else "small"


def joined(parts: Sequence[Codes]) -> Codes:
    """Matrices of one format with the same columns, one below the other."""
    zeros = [part.zero for part in parts if part.zero is not None]
    return Codes(
        parts[0].format,
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.scale for part in parts]),
        np.concatenate(zeros) if zeros else None,
    )


def stored_scale(codes: Codes, shape: tuple[int, ...]) -> ir.TensorProtocol:
    """Scales as the graph has them."""
    dtype = codes.format.scale_dtype
    return ir.Tensor(codes.scale.astype(dtype.numpy()).reshape(shape), dtype)


def pack(codes: np.ndarray, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.TensorProtocol:
    """Codes, one to a byte, as a tensor of ``dtype`` in ONNX's packing (first in the low bits)."""
    bits = int(dtype.itemsize * 8)
    flat = codes.reshape(-1).view(np.uint8)
    if bits == 8:
        return ir.Tensor(in_a_file(flat).view(dtype.numpy()).reshape(shape), dtype)
    each = 8 // bits
    apart = np.concatenate([flat, np.zeros(-flat.size % each, np.uint8)]).reshape(-1, each)
    apart &= np.uint8((1 << bits) - 1)
    packed = apart[:, 0].copy()
    for place in range(1, each):
        packed |= apart[:, place] << np.uint8(place * bits)
    return ir.PackedTensor(in_a_file(packed), dtype, shape=shape)


def in_a_file(array: np.ndarray) -> np.ndarray:
    """The same bytes, uint8, mapped from a file without a name if they are many.

    A model's codes wait there until they are written: memory that the system can take back. Many
    share a file, since each mapping keeps one open.
    """
    if array.nbytes < _IN_MEMORY:
        return array
    with _LOCK:
        start = _FILE.get("end", 0)
        if "map" not in _FILE or start + array.nbytes > len(_FILE["map"]):
            start, size = 0, max(_FILE_BYTES, array.nbytes)
            with tempfile.TemporaryFile() as file:
                file.truncate(size)  # takes no room before it is written
                _FILE["map"] = np.memmap(file, np.uint8, "r+", shape=(size,))
        _FILE["end"] = start + array.nbytes
        found: np.ndarray = _FILE["map"][start : start + array.nbytes]
    found[:] = array
    return found


_FILE: dict[str, Any] = {}
"""The file that codes go to now; it is gone when no codes in it are used and it is full."""

_LOCK = threading.Lock()


def pack_three_bits(codes: np.ndarray) -> np.ndarray:
    """Codes 0..7 uint8, or -4..3 int8, ``[R, C]`` packed as ``hal::UnpackBits`` reads them.

    Returns uint8 ``[R, C * 3 / 8]``.
    """
    rows = codes.shape[0]
    if codes.dtype == np.int8:
        codes = (codes + np.int8(4)).view(np.uint8)
    low = (codes & 3).reshape(rows, -1, 4) << np.array([0, 2, 4, 6], np.uint8)
    high = (codes >> 2).reshape(rows, -1, 8) << np.arange(8, dtype=np.uint8)
    return np.concatenate(
        [np.bitwise_or.reduce(low, axis=2), np.bitwise_or.reduce(high, axis=2)], axis=1
    )
