"""Golden results: what a neutral graph means, computed without any backend of ours.

    >>> evaluate(graph, {"x": array})["y"]
    >>> evaluate(graph, {"x": array}, outputs=["layer.3.attention"])   # any value, for bisecting

Local functions are inlined by onnx's own inliner and the result runs on ONNX Runtime with every
optimization off; what that cannot run goes through ``onnx.reference``. Weights are fed by
reference, so a large model is not copied.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx.reference
import onnx_ir as ir
import onnxruntime as ort

from hal.errors import GraphError, InputError, did_you_mean
from hal.ir.graph import Graph
from hal.ir.inline import function_body, inline_functions
from hal.ir.ortvalue import Array, as_numpy, from_ort, from_packed, to_ort
from hal.ir.parts import split
from hal.ir.small_floats import restate_small_floats
from hal.ir.weights import as_bytes

_OLDER = 26
_ONLY_NEW_DTYPES = {
    "Cast", "DepthToSpace", "DequantizeLinear", "QuantizeLinear", "Range", "SpaceToDepth"
}  # fmt: skip
"""Ops whose newest revisions add dtypes, which a model that runs with the older ones does not have.
"""

_MADE = 32 << 20
"""Numbers that are made of weights at a time (of codes, or by transposing): 128 MiB."""

_BYTE = 8
_EMBED_LIMIT = 4096  # bytes; larger initializers are fed as inputs


def evaluate(
    graph: Graph, inputs: Mapping[str, Any], outputs: list[str] | None = None
) -> dict[str, Any]:
    """Run ``graph`` on ``inputs`` (state included) and return the named values.

    ``outputs`` may name any value of the top-level graph; by default the graph's outputs. Tensors
    are numpy arrays in the value's dtype (ml_dtypes for bfloat16 and the like), sequences are
    lists, an empty optional is None.

    Raises:
        InputError: an input is missing.
        GraphError: ``outputs`` names no value, or neither evaluator can run the graph.
    """
    return Evaluator(graph, outputs)(inputs)


class Evaluator:
    """:func:`evaluate` for many calls on one graph, which must not change meanwhile."""

    def __init__(self, graph: Graph, outputs: list[str] | None = None) -> None:
        """See :func:`evaluate`.

        Raises:
            GraphError: ``outputs`` names no value.
        """
        wanted = [v.name or "" for v in graph.graph.outputs] if outputs is None else outputs
        known = {v.name or "": v for v in _values(graph.graph)}
        for name in wanted:
            if name not in known:
                raise GraphError(f"no value {name!r} in the graph", did_you_mean(name, known))
        values = [known[name] for name in wanted]
        pieces = split(graph, values, _MADE) if all(v.producer() for v in values) else []
        self._wanted = wanted
        if len(pieces) > 1:
            self._parts = [_Part(piece, names) for piece, names in pieces]
        else:
            self._parts = [_Part(graph, outputs)]

    def __call__(
        self, inputs: Mapping[str, Any], weights: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, Any]:
        """The named values for these inputs, with large ``weights`` in the place of the graph's.

        Raises:
            InputError: an input is missing.
            GraphError: neither evaluator can run the graph.
        """
        if len(self._parts) == 1:
            return self._parts[0](inputs, weights)
        values = dict(inputs)
        for index, part in enumerate(self._parts):
            values |= part(values, weights)
            later = {name for other in self._parts[index + 1 :] for name in other.needed}
            values = {n: v for n, v in values.items() if n in later or n in self._wanted}
        return {name: values[name] for name in self._wanted}


class _Part:
    """One session, or another evaluator where there can be none."""

    def __init__(self, graph: Graph, outputs: list[str] | None) -> None:
        self._name = graph.name
        self.needed = [
            value.name or ""
            for value in graph.graph.inputs
            if value.name not in graph.graph.initializers
        ]
        self._proto, self._weights = _weightless(graph, outputs)
        self._names = [value.name for value in self._proto.graph.output]
        self._session: ort.InferenceSession | None = None

    def __call__(
        self, inputs: Mapping[str, Any], weights: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, Any]:
        """See :class:`Evaluator`."""
        for name in self.needed:
            if name not in inputs:
                raise InputError(
                    f"input {name!r} is missing",
                    "given: " + (", ".join(inputs) or "nothing"),
                )
        feeds = {**inputs, **self._weights, **(weights or {})}
        failures: list[str] = []
        if self._session is not None:
            try:
                return self._results(_run_ort(self._session, feeds, self._names))
            except Exception as error:  # noqa: BLE001 - other inputs may need another evaluator
                failures.append(f"onnxruntime: {_first_line(error)}")
        for attempt in _variants(self._proto):
            try:
                session = _ort_session(attempt)
                found = self._results(_run_ort(session, feeds, self._names))
            except Exception as error:  # noqa: BLE001 - the next evaluator may know the op
                failures.append(f"onnxruntime: {_first_line(error)}")
            else:
                self._session = session
                return found
        try:
            evaluator = onnx.reference.ReferenceEvaluator(self._proto)
            arrays = {name: _plain(value) for name, value in feeds.items()}
            found = self._results(list(evaluator.run(None, arrays)))
            return {v.name: _unwrapped(found[v.name], v.type) for v in self._proto.graph.output}
        except Exception as error:
            failures.append(f"onnx.reference: {_first_line(error)}")
            raise GraphError(
                f"no reference evaluator runs {self._name!r} ({'; '.join(failures)})",
                "check the graph with hal.ir.verify",
            ) from error

    def _results(self, values: list[Any]) -> dict[str, Any]:
        return dict(zip(self._names, values, strict=True))


def _variants(proto: onnx.ModelProto) -> Iterator[onnx.ModelProto]:
    """The model as it is, then with functions inlined: those ORT lacks, those in ONNX schemas."""
    yield proto
    yield _for_older_kernels(proto)
    yield from _without_refused(proto)
    try:
        yield onnx.inliner.inline_selected_functions(
            proto, [], exclude=True, inline_schema_functions=True
        )
    except Exception:  # noqa: BLE001 - onnx's inliner cannot type every model; there is another evaluator
        return


def _for_older_kernels(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model in the newest operator set of ONNX Runtime 1.32, if nothing says less there."""
    used = {op.domain: op.version for op in proto.opset_import}
    version = used.get("", used.get("ai.onnx", 0))
    if version <= _OLDER:
        return proto
    op_types = {node.op_type for node in _nodes(proto.graph) if node.domain in ("", "ai.onnx")}
    for op_type in op_types - _ONLY_NEW_DTYPES:
        if onnx.defs.get_schema(op_type, version).since_version > _OLDER:
            return proto
    older = onnx.ModelProto()
    older.CopyFrom(proto)
    for op in older.opset_import:
        if op.domain in ("", "ai.onnx"):
            op.version = _OLDER
    for node in _nodes(older.graph):
        if node.op_type == "Range":  # it says how to add half floats, which the older one refuses
            kept = [attribute for attribute in node.attribute if attribute.name != "stash_type"]
            del node.attribute[:]
            node.attribute.extend(kept)
    return older


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _without_refused(proto: onnx.ModelProto) -> Iterator[onnx.ModelProto]:
    """The model with the ops inlined that ONNX Runtime says it has no kernel for, if that helps."""
    refused: set[str] = set()
    model = ir.from_proto(proto)
    while True:
        attempt = _for_older_kernels(ir.to_proto(model))
        try:
            _ort_session(attempt)
            break
        except Exception as error:  # noqa: BLE001 - the text says which op it was
            found = re.search(r"Could not find an implementation for (\w+)\(", str(error))
        if found is None or found[1] in refused:
            return
        refused.add(found[1])
        try:
            model = inline_functions(model, functools.partial(_comes_to, model, refused))
        except Exception:  # noqa: BLE001 - there is another evaluator
            return
    if refused:
        yield attempt


def _comes_to(model: ir.Model, op_types: set[str], node: ir.Node) -> bool:
    """Whether a node is one of these ops, or its body has one (the runtime inlines by itself)."""
    if node.op_type in op_types:
        return True
    body = function_body(model, node)
    return body is not None and any(inner.op_type in op_types for inner in body.all_nodes())


def _transpose_codes(graph: ir.Graph) -> None:
    """Transpose codes of the largest matrices, and not the floats that are made of them."""
    for node in list(graph):
        floats = node.inputs[0] if node.op_type == "Transpose" else None
        maker = floats.producer() if floats is not None else None
        if floats is None or maker is None or maker.op_type != "DequantizeLinear":
            continue
        parts = [value for value in maker.inputs if value is not None]
        if len(floats.uses()) > 1 or floats.is_graph_output() or not all(map(_is_matrix, parts)):
            continue
        if math.prod(parts[0].const_value.shape.numpy()) > _MADE:  # type: ignore[union-attr]
            turned = [_turned(graph, value) for value in parts]
            kept = [a for a in maker.attributes.values() if a.name != "axis"]
            axis = 1 - maker.attributes.get_int("axis", 1) % 2
            new = ir.Node("", "DequantizeLinear", turned, [ir.AttrInt64("axis", axis), *kept])
            graph.insert_before(node, new)
            node.outputs[0].replace_all_uses_with(new.outputs[0], replace_graph_outputs=True)
            new.outputs[0].name = f"{node.outputs[0].name}.turned"
            graph.remove([node, maker], safe=True)


def _is_matrix(value: ir.Value) -> bool:
    tensor = value.const_value
    return value.is_initializer() and tensor is not None and len(tensor.shape) == 2


def _turned(graph: ir.Graph, value: ir.Value) -> ir.Value:
    tensor = value.const_value
    assert tensor is not None
    array, name = np.ascontiguousarray(tensor.numpy().T), f"{value.name}.turned"
    data = ir.Tensor(array, tensor.dtype, name=name)
    new = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=data.shape, const_value=data)
    graph.register_initializer(new)
    return new


def _weightless(
    graph: Graph, outputs: list[str] | None
) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """The model with large initializers turned into inputs, and their arrays."""
    model = graph.model.clone()
    restate_small_floats(model.graph)  # ONNX Runtime 1.32 knows no floats of 4 bits
    _transpose_codes(model.graph)
    if outputs is not None:
        known = {v.name or "": v for v in _values(model.graph)}
        model.graph.outputs.clear()
        model.graph.outputs.extend(known[name] for name in outputs)
    weights: dict[str, Array] = {}
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype == ir.DataType.STRING:
            continue
        if tensor.nbytes <= _EMBED_LIMIT:
            if isinstance(tensor, ir.ExternalTensor):  # the model is run from bytes, without files
                value.const_value = ir.Tensor(tensor.numpy(), tensor.dtype, name=name)
            continue
        if tensor.dtype.bitwidth < _BYTE:  # numpy would have a byte for each code of few bits
            weights[name] = _few_bits(tensor)
        else:
            # Weights of exported modules are often transposed views: laid out once, here.
            weights[name] = np.ascontiguousarray(tensor.numpy())
        value.type = ir.TensorType(tensor.dtype)
        value.shape = ir.Shape(tensor.shape.numpy())
        del model.graph.initializers[name]
        value.const_value = None
        if value not in model.graph.inputs:
            model.graph.inputs.append(value)
    return onnx.inliner.inline_local_functions(ir.to_proto(model)), weights


def _few_bits(tensor: ir.TensorProtocol) -> ort.OrtValue:
    """A tensor whose elements have less than a byte, over the packed bytes where they are."""
    if isinstance(tensor, ir.PackedTensor):
        packed = np.asarray(tensor.raw).reshape(-1)
    else:
        packed = as_bytes(tensor, ir.Shape([tensor.nbytes]), tensor.name or "").numpy()
    return from_packed(packed, tensor.dtype, tuple(tensor.shape.numpy()))


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from (value for value in node.outputs if value.name)


def _ort_session(proto: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    # An arena lives as long as any result does, with room for the largest of all values.
    options.enable_cpu_mem_arena = False
    # Packed copies of weights would double a model's memory and gain nothing for many rows.
    options.add_session_config_entry("session.disable_prepacking", "1")
    return ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _run_ort(
    session: ort.InferenceSession, feeds: Mapping[str, Any], names: list[str]
) -> list[Any]:
    wanted = {value.name: value for value in session.get_inputs()}
    given = {name: feeds[name] for name in wanted if name in feeds}
    plain = all(v.type.startswith("tensor") and "string" not in v.type for v in wanted.values())
    if not plain:
        return list(session.run(names, {name: _plain(value) for name, value in given.items()}))
    values = {name: to_ort(value) for name, value in given.items()}
    return [from_ort(value) for value in session.run_with_ort_values(names, values)]


def _plain(value: Any) -> Any:
    """A feed as numpy arrays: sequences stay lists, None stays None."""
    if value is None or isinstance(value, dict):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return as_numpy(value)


def _unwrapped(value: Any, kind: onnx.TypeProto) -> Any:
    """An optional tensor itself, or None; ``onnx.reference`` gives a list of one or of nothing."""
    if kind.optional_type.elem_type.HasField("tensor_type") and isinstance(value, list):
        return value[0] if value else None
    return value


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
