"""ONNX files.

    >>> from_file("model.onnx").signature()

Operator sets before :data:`hal.frontends.opset.OLDEST` go through ONNX's version converter first.
External weights stay where they are and are memory-mapped when read. Functions and operators of
other domains are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx.version_converter
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from hal.errors import ModelError
from hal.frontends import opset
from hal.ir import HAL_DOMAIN, Graph
from hal.ir.ops import ensure_functions

_SMALL_BYTES = 1024  # constants that a converter may need to see, such as axes and shapes


def from_file(path: str | Path) -> Graph:
    """Read an ONNX file and bring it to the current opset.

    Raises:
        ModelError: the file is missing, truncated or no ONNX model; external data is missing, too
            short or outside the model's folder; the opset cannot be converted.
    """
    path = Path(path)
    proto = _read(path)
    # Checked before anything opens the files that the model names.
    for tensor in _external_tensors(proto):
        _check_external(path, tensor)
    for graph_proto in _graphs(proto):
        _check_names(path, graph_proto)
    try:
        model = _to_ir(path, proto)
        opset.to_current(model)
    except ModelError as error:
        raise ModelError(f"{path}: {error.message}", error.hint) from None
    common_passes.RemoveInitializersFromInputsPass()(model)
    if any(
        n.domain == HAL_DOMAIN and n.op_identifier() not in model.functions for n in model.graph
    ):
        ensure_functions(model)
    _compute_outputs(model.graph)
    _name_input_dims(model.graph)
    graph = Graph.from_model(model)
    graph.metadata.setdefault("task", "generic")
    return graph


def _compute_outputs(graph: ir.Graph) -> None:
    """Outputs that are initializers become the result of an Identity of their own."""
    for value in dict.fromkeys(v for v in graph.outputs if v.is_initializer()):
        name = value.name or ""
        del graph.initializers[name]
        value.name = f"{name}.value"
        graph.register_initializer(value)
        node = ir.node("Identity", [value], name=f"{name}.identity")
        result = node.outputs[0]
        result.name, result.shape, result.type = name, value.shape, value.type
        graph.append(node)
        for index, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[index] = result


def _read(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise ModelError(f"no such file: {path}", "check the path")
    data = path.read_bytes()
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
        parsed = True
    except DecodeError:
        parsed = False
    if parsed and proto.ir_version and proto.HasField("graph") and proto.opset_import:
        return proto
    if not data:
        raise ModelError(f"{path} is empty", "export the model again")
    if _is_text(data[:512]):
        raise ModelError(f"{path} is a text file, not an ONNX model", "pass a binary .onnx file")
    raise ModelError(
        f"{path} is not an ONNX model, or is truncated ({len(data)} bytes)",
        "export or download the file again",
    )


def _is_text(data: bytes) -> bool:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return all(c.isprintable() or c.isspace() for c in text)


def _to_ir(path: Path, proto: onnx.ModelProto) -> ir.Model:
    version = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), None)
    if version is not None and version < opset.OLDEST:
        proto = _convert_old(proto, version)
    try:
        model = ir.serde.deserialize_model(proto)
    except Exception as error:  # noqa: BLE001  anything can be in a file
        cause: BaseException = error
        while cause.__cause__ is not None:  # the outer ones only say where the reader was
            cause = cause.__cause__
        line = (str(cause).strip().splitlines() or [type(cause).__name__])[0][:200]
        raise ModelError(f"the graph is malformed: {line}", "export the model again") from None
    ir.external_data.set_base_dir(model.graph, str(path.parent.resolve()))
    if version is not None and version < 21 and _uses(model, "GroupNormalization"):
        common_passes.ShapeInferencePass()(model)
    return model


def _uses(model: ir.Model, op_type: str) -> bool:
    return any(node.op_type == op_type for node in model.graph.all_nodes())


def _convert_old(proto: onnx.ModelProto, version: int) -> onnx.ModelProto:
    """Use ONNX's converter for opsets before ours, on a copy without the weights."""
    if version < 9 and any(node.op_type == "Scan" for node in proto.graph.node):
        raise ModelError(
            f"the model uses Scan of opset {version}, which has a batch axis that newer ones lack",
            f"re-export it with opset_version {opset.OLDEST} or newer",
        )
    weights = {
        t.name: t
        for t in proto.graph.initializer
        if t.data_location == onnx.TensorProto.EXTERNAL or t.ByteSize() > _SMALL_BYTES
    }
    light = onnx.ModelProto()
    light.CopyFrom(proto)
    del light.graph.initializer[:]
    light.graph.initializer.extend(t for t in proto.graph.initializer if t.name not in weights)
    given = {value.name for value in proto.graph.input}
    for name, tensor in weights.items():
        if name not in given:
            light.graph.input.append(
                onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims)
            )
    light.ir_version = max(light.ir_version, 4)
    try:
        converted = onnx.version_converter.convert_version(light, opset.OLDEST)
    except Exception as error:  # noqa: BLE001  the converter's errors have no common type
        line = str(error).strip().splitlines()[-1][:200]
        raise ModelError(
            f"the model uses opset {version}, which cannot be converted to {opset.OLDEST}: {line}",
            f"re-export it with opset_version {opset.OLDEST} or newer",
        ) from None
    inputs = [v for v in converted.graph.input if v.name in given or v.name not in weights]
    del converted.graph.input[:]
    converted.graph.input.extend(inputs)
    converted.graph.initializer.extend(weights.values())
    return converted


def _external_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    def of_nodes(nodes: object) -> Iterator[onnx.TensorProto]:
        for node in nodes:  # type: ignore[attr-defined]
            for attribute in node.attribute:
                yield from (attribute.t, *attribute.tensors)
                for graph in (attribute.g, *attribute.graphs):
                    yield from of_graph(graph)

    def of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
        yield from graph.initializer
        yield from of_nodes(graph.node)

    for tensor in of_graph(proto.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            yield tensor
    for function in proto.functions:
        for tensor in of_nodes(function.node):
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                yield tensor


def _graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The graph and all that are nested in it."""
    todo = [proto.graph]
    while todo:
        graph = todo.pop()
        yield graph
        for attribute in (a for node in graph.node for a in node.attribute):
            todo += [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def _check_names(path: Path, graph: onnx.GraphProto) -> None:
    """Refuse a value that is defined twice in one graph; an input may have a default value."""
    definitions = [(value.name, "an input") for value in graph.input]
    given = {value.name for value in graph.input}
    for index, node in enumerate(graph.node):
        label = f"node {node.name!r}" if node.name else f"node {index}"
        definitions += [(name, f"{label} ({node.op_type})") for name in node.output if name]
    definitions += [(t.name, "an initializer") for t in graph.initializer if t.name not in given]
    known: dict[str, str] = {}
    for name, by in definitions:
        if name in known:
            raise ModelError(
                f"{path}: value {name!r} is defined twice: by {known[name]} and by {by}",
                "names of values must be unique in a graph; export the model again",
            )
        known[name] = by


def _check_external(path: Path, tensor: onnx.TensorProto) -> None:
    """Refuse data that is missing, too short, or outside the model's folder."""
    info = {entry.key: entry.value for entry in tensor.external_data}
    location = info.get("location", "")
    base = path.parent.resolve()
    file = (base / location).resolve()
    if not location or Path(location).is_absolute() or not file.is_relative_to(base):
        raise ModelError(
            f"{path}: tensor {tensor.name!r} keeps its data in {location!r}, outside the model's"
            " folder",
            "external data must lie next to the model or below it; save the model again",
        )
    if not file.is_file():
        raise ModelError(
            f"{path}: tensor {tensor.name!r} keeps its data in {location!r}, which does not exist",
            f"put the file {file.name} into {file.parent}",
        )
    try:
        offset = int(info.get("offset", 0))
        needed = _nbytes(tensor)
        length = int(info.get("length", needed))
    except ValueError:
        raise ModelError(
            f"{path}: tensor {tensor.name!r} has a malformed offset or length",
            "save the model again",
        ) from None
    size = file.stat().st_size
    if offset < 0 or length < needed or offset + needed > size:
        raise ModelError(
            f"{path}: tensor {tensor.name!r} needs bytes {offset} to {offset + needed} of"
            f" {location!r}, which has {size} bytes"
            + (f" (length {length} is declared)" if length < needed else ""),
            "the data file is truncated or belongs to another model; fetch it again",
        )


def _nbytes(tensor: onnx.TensorProto) -> int:
    count = 1
    for dim in tensor.dims:
        count *= dim
    return -(-count * ir.DataType(tensor.data_type).bitwidth // 8)


def _name_input_dims(graph: ir.Graph) -> None:
    """Give unnamed dynamic dims of inputs a name, such as ``x_0``."""
    for value in graph.inputs:
        if value.shape is not None:
            value.shape = ir.Shape(
                ir.SymbolicDim(f"{value.name}_{axis}")
                if isinstance(dim, ir.SymbolicDim) and dim.value is None
                else dim
                for axis, dim in enumerate(value.shape)
            )
