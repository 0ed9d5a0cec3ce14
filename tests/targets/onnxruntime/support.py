"""Build and load graphs with the backend alone, without the rest of the compiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx.parser
import onnx_ir as ir

from hal.bundle.files import BundleFiles, pack
from hal.descriptor import Descriptor
from hal.ir import Graph
from hal.ir.inline import infer_types
from hal.ir.ops import ensure_functions
from hal.targets import resolve
from hal.targets.backend import BuildContext, LoadContext
from hal.targets.onnxruntime import OnnxRuntimeBackend
from hal.targets.onnxruntime.session import OnnxRuntimeExecutable

HEADER = '<ir_version: 13, opset_import: ["" : 28, "hal" : 1]>'


def parse(text: str, **weights: Any) -> Graph:
    """A graph from ONNX's text form (without the header); ``weights`` become initializers."""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(HEADER + text))
    for name, array in weights.items():
        value = next(v for n in model.graph.all_nodes() for v in n.inputs if v and v.name == name)
        value.const_value = ir.tensor(array, name=name)
        value.type = ir.TensorType(value.const_value.dtype)
        value.shape = ir.Shape(array.shape)
        model.graph.register_initializer(value)
    ensure_functions(model)
    infer_types(model)
    return Graph(model)


def descriptor(**changes: Any) -> Descriptor:
    """The host's descriptor, its route changed."""
    host = resolve("host:onnxruntime").descriptor
    if not changes:
        return host
    route = host.routes["onnxruntime"].model_copy(update=changes)
    return host.model_copy(update={"routes": {"onnxruntime": route}})


def build(graph: Graph, root: Path) -> dict[str, Any]:
    """Build into ``root/builds``."""
    folder = root / "builds"
    folder.mkdir(exist_ok=True)
    return OnnxRuntimeBackend().build(graph, BuildContext(descriptor(), folder, root))


def load(record: dict[str, Any], root: Path, chip: Descriptor | None = None) -> Any:
    """Load from a directory or, if ``root`` is a file, from a packed bundle."""
    context = LoadContext(chip or descriptor(), "builds", BundleFiles.open(root), 1)
    return OnnxRuntimeBackend().load(record, context)


def executable(graph: Graph, root: Path) -> OnnxRuntimeExecutable:
    """Build and load."""
    result = load(build(graph, root), root)
    assert isinstance(result, OnnxRuntimeExecutable)
    return result


def packed(root: Path, target: Path) -> Path:
    """Make one file of a bundle folder."""
    pack(root, target)
    return target
