"""Shapes as expressions: what every value's extents are, in terms of the graph inputs' dims.

:func:`analyse` walks the graph once and finds, for each value, a tuple of ``sympy`` expressions
(its shape) and, for small integer tensors that are computed from shapes, the elements themselves.
An extent that cannot be expressed becomes a fresh ``Dummy``: equal to itself, unequal to others.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx.defs
import onnx.numpy_helper
import onnx.shape_inference
import onnx_ir as ir
import sympy

from hal.ir import OPSET, Graph
from hal.passes._dims import LIMIT, Extent, Shapes, fresh, known, opaque, text, to_expr
from hal.passes._edit import all_values, is_constant, static_shape
from hal.passes._extents import ELEMENTS, SHAPES

__all__ = ["Shapes", "analyse", "known"]


def analyse(graph: Graph) -> Shapes:
    """Infer shapes from the graph's inputs and weights; declared ones fill what stays unknown."""
    result = Shapes()
    for value in all_values(graph):
        if value.producer() is None:
            _start(result, value)
    functions = {(f.domain, f.name): f for f in graph.model.functions.values()}
    for node in graph.nodes():
        _infer(result, node, functions)
    return result


def _start(result: Shapes, value: ir.Value) -> None:
    if is_constant(value) and value.const_value is not None:
        result.shape[value] = tuple(sympy.Integer(d) for d in static_shape(value.const_value))
        integral = value.const_value.dtype in (ir.DataType.INT64, ir.DataType.INT32)
        if integral and value.const_value.size <= LIMIT:
            numbers = value.const_value.numpy()
            elements = np.array([sympy.Integer(int(n)) for n in numbers.reshape(-1)], dtype=object)
            result.elements[value] = elements.reshape(numbers.shape)
    elif value.shape is not None:
        result.shape[value] = tuple(to_expr(d) for d in value.shape)


def _infer(result: Shapes, node: ir.Node, functions: dict[tuple[str, str], ir.Function]) -> None:
    body = functions.get((node.domain, node.op_type))
    if body is not None:
        _infer_body(result, node, body)
    elif node.domain in ("", "ai.onnx"):
        try:
            rule = ELEMENTS.get(node.op_type)
            elements = rule(result, node) if rule is not None else None
        except (ValueError, IndexError, TypeError, KeyError):
            elements = None
        if elements is not None and elements.size <= LIMIT:
            result.elements[node.outputs[0]] = elements
        if not _own_shape(result, node):
            _library_shape(result, node)
    for value in node.outputs:
        _merge_declared(result, value)


def _merge_declared(result: Shapes, value: ir.Value) -> None:
    """Fill unknown extents from the shape the value already had."""
    declared = value.shape
    found = result.shape.get(value)
    if declared is None:
        return
    if found is None:
        result.shape[value] = tuple(to_expr(d) for d in declared)
    elif len(found) == len(declared):
        result.shape[value] = tuple(
            to_expr(d) if opaque(e) and (isinstance(d, int) or d.value is not None) else e
            for e, d in zip(found, declared, strict=True)
        )


def _infer_body(result: Shapes, node: ir.Node, function: ir.Function) -> None:
    """Shapes of a function call: its body's, with the arguments' shapes put in."""
    inner = Shapes()
    body = function.clone()
    for formal, actual in zip(body.inputs, node.inputs, strict=False):
        if actual is None:
            continue
        formal.type = actual.type
        if actual in result.shape:
            inner.shape[formal] = result.shape[actual]
        if actual in result.elements:
            inner.elements[formal] = result.elements[actual]
    for step in body:
        if is_op_constant := (step.op_type == "Constant" and step.domain == ""):
            _constant_output(inner, step)
        if not is_op_constant:
            _infer(inner, step, {})
    for made, formal in zip(node.outputs, body.outputs, strict=False):
        if formal in inner.shape:
            result.shape[made] = inner.shape[formal]
        made.type = made.type or formal.type


def _constant_output(result: Shapes, node: ir.Node) -> None:
    value = node.outputs[0]
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None:
        return
    value.type = ir.TensorType(tensor.dtype)
    result.shape[value] = tuple(sympy.Integer(d) for d in static_shape(tensor))
    if tensor.dtype in (ir.DataType.INT64, ir.DataType.INT32) and tensor.size <= LIMIT:
        flat = [sympy.Integer(int(n)) for n in tensor.numpy().reshape(-1)]
        result.elements[value] = np.array(flat, dtype=object).reshape(static_shape(tensor))


def _own_shape(result: Shapes, node: ir.Node) -> bool:
    """Shapes of ops whose extents are arithmetic, which the library cannot express."""
    rule = SHAPES.get(node.op_type)
    if rule is None:
        return False
    try:
        extents = rule(result, node)
    except (KeyError, ValueError, IndexError, TypeError):
        return False
    if extents is None:
        return False
    _library_shape(result, node)  # for the dtype, and for further outputs
    result.shape[node.outputs[0]] = tuple(sympy.expand(e) for e in extents)
    return True


def _attention_shape(result: Shapes, node: ir.Node) -> None:
    """Present keys and values are the past ones with the new ones appended."""
    for output, past, new in ((1, 4, 1), (2, 5, 2)):
        if len(node.outputs) <= output or len(node.inputs) <= past or node.inputs[past] is None:
            continue
        old, appended = node.inputs[past], node.inputs[new]
        before = result.shape.get(old) if old is not None else None
        added = result.shape.get(appended) if appended is not None else None
        if before is None or added is None or len(before) != 4:
            continue
        length = added[2] if len(added) == 4 else added[1]
        extents = (before[0], before[1], sympy.expand(before[2] + length), before[3])
        result.shape[node.outputs[output]] = extents


def _library_shape(result: Shapes, node: ir.Node) -> None:
    """Ask ONNX's own inference for one node, expressions travelling as names."""
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in _attributes(node)):
        return
    names: dict[str, Extent] = {}
    types: dict[str, onnx.TypeProto] = {}
    data: dict[str, onnx.TensorProto] = {}
    for value in node.inputs:
        if value is None:
            continue
        if value.type is None or not value.name:
            return
        types[value.name] = _type_proto(value, result.shape.get(value), names)
        found = _data(result, value)
        if found is not None:
            data[value.name] = found
    try:
        schema = onnx.defs.get_schema(node.op_type, OPSET, "")
        inferred = onnx.shape_inference.infer_node_outputs(
            schema, ir.serde.serialize_node(node), types, data,
            opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        )  # fmt: skip
    except Exception:  # noqa: BLE001 - the library raises RuntimeError subclasses that it does not export
        inferred = {}
    for value in node.outputs:
        found = inferred.get(value.name or "")
        if found is not None:
            _take(result, value, found, names)
    if node.op_type == "Attention":
        _attention_shape(result, node)


def _data(result: Shapes, value: ir.Value) -> onnx.TensorProto | None:
    """The elements of a small tensor, if they are known to be numbers."""
    tensor = value.const_value
    if tensor is not None:
        return ir.serde.serialize_tensor(tensor) if tensor.size <= LIMIT else None
    elements = result.elements.get(value)
    numbers = known(elements) if elements is not None else None
    if elements is None or numbers is None or value.dtype is None:
        return None
    array = np.array(numbers, dtype=value.dtype.numpy()).reshape(elements.shape)
    return onnx.numpy_helper.from_array(array, value.name)


def _attributes(node: ir.Node) -> list[ir.Attr]:
    return [a for a in node.attributes.values() if not a.is_ref()]


def _type_proto(
    value: ir.Value, extents: tuple[Extent, ...] | None, names: dict[str, Extent]
) -> onnx.TypeProto:
    assert value.type is not None
    proto = ir.serde.serialize_type(value.type)
    if extents is None or not proto.HasField("tensor_type"):
        return proto
    proto.tensor_type.shape.Clear()
    for extent in extents:
        if extent.is_Integer:
            proto.tensor_type.shape.dim.add().dim_value = int(extent)
        else:
            name = text(extent)
            if opaque(extent):
                name = f"?{abs(hash(extent))}"
            names[name] = extent
            proto.tensor_type.shape.dim.add().dim_param = name
    return proto


def _take(result: Shapes, value: ir.Value, proto: onnx.TypeProto, names: dict[str, Extent]) -> None:
    inferred = ir.serde.deserialize_type_proto_for_type(proto)
    if inferred is not None:
        value.type = inferred
    kind = proto.tensor_type
    if not kind.HasField("shape"):
        return
    extents = []
    for dim in kind.shape.dim:
        if dim.HasField("dim_value"):
            extents.append(sympy.Integer(dim.dim_value))
        elif dim.dim_param in names:
            extents.append(names[dim.dim_param])
        else:
            extents.append(fresh())
    result.shape[value] = tuple(extents)
