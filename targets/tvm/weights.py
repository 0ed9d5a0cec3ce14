"""Where the weights of a build are, and bringing them into TVM tensors without copying.

A weight is a byte range of a file of the bundle. Tensors that live in memory when a segment is
built are written to ``weights.bin`` in the build's own folder.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hal.targets.backend import WeightStore
from hal.targets.tvm import runtime
from hal.targets.tvm.runtime import ALIGNMENT
from hal.targets.tvm.storage import PACKED_BITS, SMALL_FLOATS, STORED_AS

if TYPE_CHECKING:
    import onnx_ir as ir

OWN_FILE = "weights.bin"


@dataclasses.dataclass(frozen=True)
class Weight:
    """A byte range that holds a tensor as ONNX stores it (4-bit types packed).

    ``own`` says that ``location`` is relative to the build's folder and not to the bundle's root.
    """

    location: str
    offset: int
    length: int
    dtype: str
    shape: tuple[int, ...]
    own: bool = False

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Weight:
        """Build from the dictionary that ``dataclasses.asdict`` gives."""
        return cls(**{**data, "shape": tuple(data["shape"])})


def record_weights(values: Sequence[ir.Value], folder: Path) -> list[Weight]:
    """Describe the weights; those without a file are written to :data:`OWN_FILE`."""
    from onnx_ir import ExternalTensor  # loading weights needs no graph

    weights: list[Weight] = []
    position = 0
    path = folder / OWN_FILE
    handle = None
    try:
        for value in values:
            tensor = value.const_value
            assert tensor is not None
            shape = tuple(int(d) for d in tensor.shape.numpy())
            if isinstance(tensor, ExternalTensor):
                length = tensor.length if tensor.length is not None else tensor.nbytes
                offset = tensor.offset or 0
                weights.append(
                    Weight(str(tensor.location), offset, length, tensor.dtype.name, shape)
                )
                continue
            handle = handle or path.open("wb")
            data = tensor.tobytes()
            weights.append(
                Weight(OWN_FILE, position, len(data), tensor.dtype.name, shape, own=True)
            )
            handle.write(data + bytes(-len(data) % ALIGNMENT))
            position += len(data) + -len(data) % ALIGNMENT
    finally:
        if handle is not None:
            handle.close()
    return weights


def load_weights(
    weights: Sequence[Weight], files: WeightStore, folder: str
) -> tuple[list[runtime.Tensor], list[Any]]:
    """Tensors of all weights, and what must stay alive as long as they are used."""
    maps: dict[str, memoryview] = {}
    tensors = []
    for weight in weights:
        location = f"{folder}/{weight.location}" if weight.own else weight.location
        if location not in maps:
            maps[location] = files.mapped(location)
        data = maps[location][weight.offset : weight.offset + weight.length]
        tensors.append(_tensor(data, weight.dtype, weight.shape))
    return tensors, [*maps.values()]


def _tensor(data: memoryview, dtype: str, shape: tuple[int, ...]) -> runtime.Tensor:
    raw = np.frombuffer(data, np.uint8)
    if dtype in PACKED_BITS:
        return runtime.tensor(_unpacked(raw, dtype, shape))
    stored = "uint8" if dtype in SMALL_FLOATS else STORED_AS[dtype]
    return shared_tensor(raw, stored, shape)


def shared_tensor(raw: np.ndarray, stored: str, shape: tuple[int, ...]) -> runtime.Tensor:
    """A tensor over the bytes ``raw`` where they are aligned, over a copy otherwise.

    The caller keeps the memory alive, and nothing writes to it: it may be a read-only mapping.
    """
    address = raw.ctypes.data
    if address % ALIGNMENT == 0 and raw.nbytes and stored != "bool":
        carrier = (
            np.dtype(f"u{np.dtype(stored).itemsize}") if stored == "bfloat16" else np.dtype(stored)
        )
        # DLPack refuses read-only arrays; a view by address has no such flag.
        memory = memoryview((ctypes.c_char * raw.nbytes).from_address(address))
        return runtime.view(np.frombuffer(memory, carrier).reshape(shape), stored, shape)
    return runtime.tensor(np.frombuffer(raw.tobytes(), np.dtype(stored)).reshape(shape))


def _unpacked(raw: np.ndarray, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Elements of a packed tensor, one to a byte in the storage dtype (first in the low bits)."""
    bits = PACKED_BITS[dtype]
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = ((raw[:, None] >> shifts) & ((1 << bits) - 1)).reshape(-1)
    codes = codes[: int(np.prod(shape))].reshape(shape)
    if STORED_AS[dtype] == "uint8":
        return np.ascontiguousarray(codes)
    half = np.int8(1 << (bits - 1))
    return (codes.astype(np.int8) ^ half) - half
