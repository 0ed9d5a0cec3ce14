"""Initializers of a built model: references into the bundle's files, never data in the model.

Tensors that the bundle already holds stay where they are (their location is relative to the
bundle's root); tensors that legalization made are written next to the model as safetensors.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir

from hal.ir import Graph
from hal.ir.weights import INLINE_BYTES, write_weights
from hal.targets.backend import WeightStore


def externalize(graph: Graph, folder: Path, bundle: Path) -> int:
    """Turn the graph's large initializers, in place, into references relative to ``bundle``.

    Returns the bytes of the tensors written to ``folder``; there is no file when nothing had to be.
    """
    before = _bytes_in_files(graph)
    for name, value in graph.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes <= INLINE_BYTES:
            value.const_value = ir.Tensor(tensor.numpy().copy(), tensor.dtype, name=name)
    write_weights(graph, folder, relative_to=bundle, keep_files=True)
    return _bytes_in_files(graph) - before


def _bytes_in_files(graph: Graph) -> int:
    tensors = {id(v.const_value): v.const_value for v in graph.graph.initializers.values()}
    return sum(t.nbytes for t in tensors.values() if isinstance(t, ir.ExternalTensor))


def relocate(proto: onnx.ModelProto, files: WeightStore) -> Path:
    """Point external data, in place, at where the bundle's members really lie.

    A member may be a file of a directory or a stretch of a zip. Returns the folder that the
    rewritten locations are relative to.
    """
    places: dict[str, tuple[Path, int]] = {}
    external = list(_external(proto))
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


def weight_files(proto: onnx.ModelProto, folder: Path) -> set[Path]:
    """Files that hold the external data of a model whose locations are relative to ``folder``."""
    return {folder / _entry(tensor, "location") for tensor in _external(proto)}


def _external(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    external = onnx.TensorProto.EXTERNAL
    return (t for t in proto.graph.initializer if t.data_location == external)


def _entry(tensor: onnx.TensorProto, key: str) -> str:
    return next((e.value for e in tensor.external_data if e.key == key), "")


def _set_entry(tensor: onnx.TensorProto, key: str, value: str) -> None:
    for entry in tensor.external_data:
        if entry.key == key:
            entry.value = value
            return
    tensor.external_data.add(key=key, value=value)
