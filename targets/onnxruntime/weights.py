"""Initializers of a built model: references into the bundle's files, never data in the model.

Tensors that the bundle already holds stay where they are (their location is relative to the
bundle's root); tensors that legalization made are written next to the model as safetensors.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import onnx
import onnx_ir as ir

from hal.targets.backend import WeightStore

EMBED_LIMIT = 1024
"""Bytes up to which a tensor is kept in the model file: shapes, axes, scalars."""

_ALIGNMENT = 64

_SAFETENSORS = {
    ir.DataType.FLOAT: "F32",
    ir.DataType.DOUBLE: "F64",
    ir.DataType.FLOAT16: "F16",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.INT8: "I8",
    ir.DataType.INT16: "I16",
    ir.DataType.INT32: "I32",
    ir.DataType.INT64: "I64",
    ir.DataType.UINT8: "U8",
    ir.DataType.UINT16: "U16",
    ir.DataType.UINT32: "U32",
    ir.DataType.UINT64: "U64",
    ir.DataType.BOOL: "BOOL",
    ir.DataType.FLOAT8E4M3FN: "F8_E4M3",
    ir.DataType.FLOAT8E5M2: "F8_E5M2",
}


def externalize(
    model: ir.Model, folder: Path, bundle: Path, file: str = "weights.safetensors"
) -> int:
    """Turn the model's large initializers, in place, into references relative to ``bundle``.

    Returns the bytes written to ``folder / file``; there is no file when nothing had to be.
    """
    pending: dict[str, ir.TensorProtocol] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.dtype is ir.DataType.STRING:
            continue
        if tensor.nbytes <= EMBED_LIMIT:
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = ir.Tensor(tensor.numpy().copy(), tensor.dtype, name=name)
        elif not isinstance(tensor, ir.ExternalTensor):
            pending[name] = tensor
    if not pending:
        return 0
    path = folder / file
    offsets = write_safetensors(path, pending)
    location = path.relative_to(bundle).as_posix()
    for name, tensor in pending.items():
        offset, length = offsets[name]
        model.graph.initializers[name].const_value = ir.ExternalTensor(
            location,
            offset,
            length,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=name,
            base_dir=bundle,
        )
    return sum(length for _, length in offsets.values())


def write_safetensors(
    path: Path, tensors: dict[str, ir.TensorProtocol]
) -> dict[str, tuple[int, int]]:
    """Write tensors one after the other; return offset and length of each in the file.

    Dtypes that safetensors has no name for are stored as bytes (``U8``).
    """
    header: dict[str, object] = {}
    position = 0
    for name, tensor in tensors.items():
        dtype = _SAFETENSORS.get(tensor.dtype)
        shape = list(tensor.shape.numpy()) if dtype else [tensor.nbytes]
        end = position + tensor.nbytes
        header[name] = {"dtype": dtype or "U8", "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    start = 8 + len(text)
    offsets: dict[str, tuple[int, int]] = {}
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        position = start
        for name, tensor in tensors.items():
            file.write(tensor.tobytes())
            offsets[name] = (position, tensor.nbytes)
            position += tensor.nbytes
    return offsets


def relocate(proto: onnx.ModelProto, files: WeightStore) -> Path:
    """Point external data, in place, at where the bundle's members really lie.

    A member may be a file of a directory or a stretch of a zip. Returns the folder that the
    rewritten locations are relative to.
    """
    places: dict[str, tuple[Path, int]] = {}
    external = [t for t in proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    for tensor in external:
        location = _entry(tensor, "location")
        if location not in places:
            path, offset, _ = files.locate(location)
            places[location] = (path.resolve(), offset)
    if not places:
        return Path.cwd()
    folder = Path(os.path.commonpath([str(path.parent) for path, _ in places.values()]))
    for tensor in external:
        path, base = places[_entry(tensor, "location")]
        _set_entry(tensor, "location", path.relative_to(folder).as_posix())
        _set_entry(tensor, "offset", str(base + int(_entry(tensor, "offset") or 0)))
    return folder


def _entry(tensor: onnx.TensorProto, key: str) -> str:
    return next((e.value for e in tensor.external_data if e.key == key), "")


def _set_entry(tensor: onnx.TensorProto, key: str, value: str) -> None:
    for entry in tensor.external_data:
        if entry.key == key:
            entry.value = value
            return
    tensor.external_data.add(key=key, value=value)
