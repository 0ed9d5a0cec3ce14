"""Function bodies: replace a node by the ops that define it.

Two kinds of op have a body: those that ONNX itself defines by a function (``Swish``, ``SwiGLU``,
``LayerNormalization``, ``Attention``, …) and those that a model defines in ``model.functions``
(every op of the ``hal`` domain). A backend without a kernel for such an op inlines it.

    >>> plain = inline_functions(model, lambda node: node.op_type == "Swish")

Weights are neither read nor copied: the new model shares its initializers with the old one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import onnx
import onnx.shape_inference
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from hal.errors import GraphError

logger = logging.getLogger(__name__)

_SMALL = 1024  # bytes; inference may want to see shapes and axes
_MARK = "hal.inline."
_MAX_DEPTH = 32


def inline_functions(model: ir.Model, should_inline: Callable[[ir.Node], bool]) -> ir.Model:
    """Return a copy of ``model`` in which chosen nodes are replaced by their bodies.

    ``should_inline`` is asked for every node that may have a body, those of subgraphs and of
    bodies just inlined included. A node that was chosen but has no body for its input types
    stays. Graph inputs and outputs keep their names; new values are named ``<output>/<name>``.

    Raises:
        GraphError: bodies contain each other without end.
    """
    model = model.clone()
    without_body: set[ir.Node] = set()
    for _ in range(_MAX_DEPTH):
        chosen = [
            node
            for node in model.graph.all_nodes()
            if node not in without_body and may_have_body(model, node) and should_inline(node)
        ]
        if not chosen:
            return model
        if any(_lacks_types(node) for node in chosen):
            infer_types(model)
        names = _Names(model)
        for node in chosen:
            body = function_body(model, node)
            if body is None:
                without_body.add(node)
            else:
                _attach(model, node, body, names)
        InlinePass(criteria=lambda function: function.overload.startswith(_MARK))(model)
    raise GraphError(
        f"function bodies in {model.graph.name or 'the model'!r} are nested without end",
        "a function of the model calls itself",
    )


def may_have_body(model: ir.Model, node: ir.Node) -> bool:
    """Whether ``node`` is defined by a function of the model or of an ONNX schema."""
    if node.op_identifier() in model.functions:
        return True
    schema = schema_of(model, node)
    return schema is not None and bool(schema.has_function or schema.has_context_dependent_function)


def function_body(model: ir.Model, node: ir.Node) -> ir.Function | None:
    """The body that defines ``node``, specialized to its attributes and input types.

    Returns None when there is none, which for some ops depends on the types. The function is a
    fresh copy, stated in the operator set of the model.
    """
    own = model.functions.get(node.op_identifier())
    if own is not None:
        copy = own.clone()
        _restate(model, copy)  # where it cannot be, the inliner says so
        return copy
    schema = schema_of(model, node)
    if schema is None:
        return None
    proto = onnx.FunctionProto()
    if schema.has_function:
        version = max(schema.function_opset_versions)
        proto.ParseFromString(schema.get_function_with_opset_version(version))
    elif schema.has_context_dependent_function:
        version = max(schema.context_dependent_function_opset_versions)
        types = [_type_bytes(value) for value in node.inputs]
        if any(t is None for t in types):
            return None
        data = schema.get_context_dependent_function_with_opset_version(
            version, ir.to_proto(node).SerializeToString(), types
        )
        if not data:
            return None
        proto.ParseFromString(data)
    else:
        return None
    if not proto.node or not _complete(proto, node):
        return None
    return _at_model_opset(model, node, proto)


def schema_of(model: ir.Model, node: ir.Node) -> Any:
    """The ``OpSchema`` of ``node`` in the operator sets that the model imports, or None.

    Untyped, because onnx's stubs leave out what it knows about functions.
    """
    version = model.opset_imports.get(node.domain)
    if version is None:
        return None
    try:
        return onnx.defs.get_schema(node.op_type, version, node.domain)
    except onnx.defs.SchemaError:
        return None


def infer_types(model: ir.Model) -> None:
    """Fill in types and shapes of values in place, as far as ONNX can tell.

    What cannot be inferred is left as it is; large initializers are not read. (onnx_ir's own pass
    is not used: it makes tensors of sequences.)
    """
    light = model.clone()
    for name, value in list(light.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.nbytes <= _SMALL:
            continue
        value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
        del light.graph.initializers[name]
        if value not in light.graph.inputs:
            light.graph.inputs.append(value)
    try:
        inferred = onnx.shape_inference.infer_shapes(ir.to_proto(light), data_prop=True)
    except Exception as error:  # noqa: BLE001 - onnx raises what it likes
        logger.info("no types inferred for %s: %s", model.graph.name, error)
        return
    for graph, other in zip(
        model.graphs(), ir.serde.deserialize_model(inferred).graphs(), strict=True
    ):
        known = ir.convenience.create_value_mapping(other)
        for name, value in ir.convenience.create_value_mapping(graph).items():
            found = known.get(name)
            if found is not None and found.type is not None:
                value.type = found.type
                value.shape = found.shape if found.shape is not None else value.shape


def _lacks_types(node: ir.Node) -> bool:
    return any(value is not None and value.type is None for value in node.inputs)


def _type_bytes(value: ir.Value | None) -> bytes | None:
    """Serialized ``TypeProto`` of a node input; empty for one left out, None when unknown."""
    if value is None:
        return b""
    if value.type is None:
        return None
    proto = onnx.TypeProto()
    ir.serde.serialize_type_into(proto, value.type)
    if value.shape is not None and isinstance(value.type, ir.TensorType):
        ir.serde.serialize_shape_into(proto, value.shape)
    return bytes(proto.SerializeToString())


def _complete(proto: onnx.FunctionProto, node: ir.Node) -> bool:
    """Give a value to outputs that the body leaves out; false if the body is of no use.

    Bodies made for a node do not compute its optional outputs when the node has none.
    """
    made = {*proto.input, *(name for inner in proto.node for name in inner.output)}
    if not _closed(proto.node, made):
        return False  # a body made from a subgraph can lack the subgraph's own constants
    for index, name in enumerate(proto.output):
        if name in made:
            continue
        if index < len(node.outputs) and node.outputs[index].name:
            return False
        proto.output[index] = name or f"unused_{index}"
        proto.node.append(onnx.helper.make_node("Constant", [], [proto.output[index]], value_int=0))
    return True


def _closed(nodes: Iterable[onnx.NodeProto], made: set[str]) -> bool:
    """Whether nodes, those of their subgraphs included, read only what is defined."""
    for node in nodes:
        if any(name and name not in made for name in node.input):
            return False
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                inside = {v.name for v in graph.input} | {t.name for t in graph.initializer}
                inside |= {name for inner in graph.node for name in inner.output}
                if not _closed(graph.node, made | inside):
                    return False
    return True


def _at_model_opset(
    model: ir.Model, node: ir.Node, proto: onnx.FunctionProto
) -> ir.Function | None:
    """Restate a schema's function in the model's operator sets, or None if that changes it."""
    function = ir.serde.deserialize_function(proto)
    if not _restate(model, function):
        return None
    _add_schema_defaults(model, node)
    for name in [n for n, attr in node.attributes.items() if attr.type in _GRAPH_ATTRIBUTES]:
        # The body was made for this very node: it holds the subgraph already.
        del node.attributes[name]
    return function


def _restate(model: ir.Model, function: ir.Function) -> bool:
    """State a function in the model's operator sets; False if that would change it."""
    for domain, version in list(function.opset_imports.items()):
        target = model.opset_imports.get(domain)
        if target is None:
            model.opset_imports[domain] = version
        elif target != version:
            if not all(_same_call(inner, version, target) for inner in function.all_nodes()):
                return False
            function.opset_imports[domain] = target
    for inner in function.all_nodes():
        inner.version = None
    return True


_GRAPH_ATTRIBUTES = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _same_call(node: ir.Node, version: int, target: int) -> bool:
    """Whether a node of a body written for ``version`` is a valid call with ``target``'s schema."""
    if node.domain not in ("", "ai.onnx"):
        return True
    old = onnx.defs.get_schema(node.op_type, version, "")
    new = onnx.defs.get_schema(node.op_type, target, "")
    if old.since_version == new.since_version:
        return True
    return (
        len(node.inputs) <= new.max_input
        and not new.deprecated
        and all(name in new.attributes for name in node.attributes)
    )


def _add_schema_defaults(model: ir.Model, node: ir.Node) -> None:
    """Spell out attributes left at their default: a body refers to them by name."""
    schema = schema_of(model, node)
    if schema is None:
        return
    for name, attribute in schema.attributes.items():
        if name not in node.attributes and attribute.default_value.name:
            node.attributes[name] = ir.serde.deserialize_attribute(attribute.default_value)


class _Names:
    """Gives out value names that nothing in the model has."""

    def __init__(self, model: ir.Model) -> None:
        self._used = {name for graph in model.graphs() for name in _value_names(graph)}

    def fresh(self, name: str) -> str:
        """``name`` or ``name_2``, ``name_3``, …, whichever is first unused."""
        candidate, count = name, 1
        while candidate in self._used:
            count += 1
            candidate = f"{name}_{count}"
        self._used.add(candidate)
        return candidate


def _value_names(graph: ir.Graph) -> Iterator[str]:
    yield from graph.initializers
    for value in graph.inputs:
        yield value.name or ""
    for node in graph:
        for value in node.outputs:
            yield value.name or ""


def _subgraph_inputs(attribute: ir.Attr) -> Iterator[ir.Value]:
    if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
        yield from attribute.as_graph().inputs
    elif attribute.type == ir.AttributeType.GRAPHS and not attribute.is_ref():
        for graph in attribute.as_graphs():
            yield from graph.inputs


def _attach(model: ir.Model, node: ir.Node, body: ir.Function, names: _Names) -> None:
    """Make ``node`` the only call of ``body``, so that the inliner takes this node and no other."""
    prefix = next((v.name for v in node.outputs if v.name), None) or node.name or node.op_type
    for inner in body.all_nodes():
        inner.name = names.fresh(f"{prefix}/{inner.name or inner.op_type}")
        inside = [v for attr in inner.attributes.values() for v in _subgraph_inputs(attr)]
        for value in (*inner.outputs, *inside):
            if value.name:
                value.name = names.fresh(f"{prefix}/{value.name}")
    outputs = list(body.outputs)[: len(node.outputs)]
    for unnamed in (value for value in node.outputs if not value.name):
        unnamed.name = names.fresh(f"{prefix}/unused")  # the inliner hands names on
    seen: set[ir.Value] = set(body.inputs)
    for index, value in enumerate(outputs):
        if value in seen:  # a value handed through: the inliner would rename the caller's input
            identity = ir.Node("", "Identity", [value], name=names.fresh(f"{prefix}/Identity"))
            identity.outputs[0].name = names.fresh(f"{prefix}/{value.name}")
            body.append(identity)
            outputs[index] = value = identity.outputs[0]
        seen.add(value)
    body.outputs.clear()
    body.outputs.extend(outputs)
    node.overload = names.fresh(f"{_MARK}{prefix}")
    body.domain, body.name, body.overload = node.domain, node.op_type, node.overload
    model.functions[node.op_identifier()] = body
