"""Weights on disk: safetensors files that ``graph.onnx`` refers to as ONNX external data.

Every tensor starts at a multiple of 64 bytes wherever sizes allow it: the header is padded, and
tensors whose size is a multiple of 64 come first (the format allows no gaps). So a runtime maps
them without copying.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from hal.errors import GraphError
from hal.ir.graph import Graph

INLINE_BYTES = 1024
"""Tensors up to this size stay inside ``graph.onnx``: shape inference wants to see them."""

SHARD_BYTES = 4 << 30
"""A weight file is closed when it would pass this size."""

ALIGN = 64

_SAFETENSORS = {
    ir.DataType.FLOAT: "F32",
    ir.DataType.DOUBLE: "F64",
    ir.DataType.FLOAT16: "F16",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.INT64: "I64",
    ir.DataType.INT32: "I32",
    ir.DataType.INT16: "I16",
    ir.DataType.INT8: "I8",
    ir.DataType.UINT64: "U64",
    ir.DataType.UINT32: "U32",
    ir.DataType.UINT16: "U16",
    ir.DataType.UINT8: "U8",
    ir.DataType.BOOL: "BOOL",
    ir.DataType.FLOAT8E4M3FN: "F8_E4M3",
    ir.DataType.FLOAT8E5M2: "F8_E5M2",
}


def write_weights(
    graph: Graph,
    folder: Path,
    *,
    prefix: str = "weights",
    relative_to: Path | None = None,
    keep_files: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write the graph's large initializers into ``folder`` and make the graph refer to the files.

    Tensors are taken one at a time, so peak memory is one tensor above what the graph holds; a
    tensor shared by several initializers is written once. ``progress`` is called with the bytes
    written. Locations in the graph are relative to ``relative_to`` (default: ``folder``). With
    ``keep_files``, initializers that lie in files already stay there.

    Returns:
        The files written.
    """
    wanted: dict[int, tuple[ir.TensorProtocol, list[ir.Value]]] = {}
    for value in graph.graph.initializers.values():
        tensor = value.const_value
        if keep_files and isinstance(tensor, ir.ExternalTensor):
            continue
        if tensor is None or tensor.dtype is ir.DataType.STRING or tensor.nbytes <= INLINE_BYTES:
            continue
        wanted.setdefault(_identity(tensor), (tensor, []))[1].append(value)
    # Aligned sizes first; the sort is stable, so layers keep their order.
    entries = sorted(wanted.values(), key=lambda item: item[0].nbytes % ALIGN != 0)
    files: list[Path] = []
    for number, shard in enumerate(_shards(entries), 1):
        path = folder / f"{prefix}-{number:05d}.safetensors"
        location = path.relative_to(relative_to or folder).as_posix()
        _write_shard(path, location, shard, progress)
        files.append(path)
    return files


def _identity(tensor: ir.TensorProtocol) -> int:
    """Same storage, shape and dtype give the same number; so tied weights are written once."""
    raw = getattr(tensor, "raw", None)
    pointer = getattr(raw, "data_ptr", None)
    if callable(pointer) and pointer():
        strides = tuple(getattr(raw, "stride", tuple)())
        return hash((pointer(), tuple(tensor.shape.numpy()), tensor.dtype, strides))
    return id(tensor)


def _shards(
    entries: Iterable[tuple[ir.TensorProtocol, list[ir.Value]]],
) -> Iterable[list[tuple[ir.TensorProtocol, list[ir.Value]]]]:
    shard: list[tuple[ir.TensorProtocol, list[ir.Value]]] = []
    size = 0
    for entry in entries:
        if shard and size + entry[0].nbytes > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(entry)
        size += entry[0].nbytes
    if shard:
        yield shard


def _write_shard(
    path: Path,
    location: str,
    entries: list[tuple[ir.TensorProtocol, list[ir.Value]]],
    progress: Callable[[int], None] | None,
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "hal"}}
    offset = 0
    for tensor, values in entries:
        dtype, shape = _container(tensor)
        header[values[0].name or ""] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 4096)  # the format allows trailing spaces in the header
    start = 8 + len(text)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)))
        stream.write(text)
        for tensor, _ in entries:
            before = stream.tell()
            _write_tensor(tensor, stream)
            if stream.tell() - before != tensor.nbytes:
                raise GraphError(
                    f"tensor {tensor.name!r} wrote the wrong number of bytes", "report this"
                )
            if progress:
                progress(tensor.nbytes)
    position = start
    for tensor, values in entries:
        for value in values:
            value.const_value = ir.ExternalTensor(
                location,
                position,
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=value.name or "",
                base_dir=str(path)[: -len(location)] or ".",
            )
        position += tensor.nbytes


def _container(tensor: ir.TensorProtocol) -> tuple[str, list[int]]:
    """Safetensors dtype and shape; dtypes it lacks are bytes here and true in graph.onnx."""
    name = _SAFETENSORS.get(tensor.dtype)
    return (name, list(tensor.shape.numpy())) if name else ("U8", [tensor.nbytes])


def _write_tensor(tensor: ir.TensorProtocol, stream: object) -> None:
    if hasattr(tensor, "tofile"):
        tensor.tofile(stream)
    else:
        stream.write(tensor.tobytes())  # type: ignore[attr-defined]


def as_bytes(tensor: ir.TensorProtocol, shape: ir.Shape, name: str) -> ir.TensorProtocol:
    """The bytes that hold ``tensor``, as UINT8 of ``shape``.

    What lies in a file is still read from there, and from the same place.
    """
    if isinstance(tensor, ir.ExternalTensor):
        return ir.ExternalTensor(
            tensor.location,
            tensor.offset,
            tensor.length,
            ir.DataType.UINT8,
            shape=shape,
            name=name,
            base_dir=tensor.base_dir,
        )
    data = np.frombuffer(tensor.tobytes(), np.uint8).reshape(shape.numpy())
    return ir.Tensor(data, name=name)
