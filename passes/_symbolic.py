"""Shapes as expressions: what every value's extents are, in terms of the graph inputs' dims.

:func:`analyse` walks the graph once and finds, for each value, a tuple of ``sympy`` expressions
(its shape) and, for small integer tensors that are computed from shapes, the elements themselves.
An extent that cannot be expressed becomes a fresh ``Dummy``: equal to itself, unequal to others.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.defs
import onnx.shape_inference
import onnx_ir as ir
import sympy

from hal.ir import OPSET, Graph
from hal.passes._edit import all_values, attribute, is_constant

Extent = Any
"""A ``sympy`` expression (``sympy`` ships no usable types)."""

LIMIT = 64
"""Integer tensors with more elements than this are data, not shapes."""


@dataclasses.dataclass
class Shapes:
    """Result of :func:`analyse`: shapes and known integer elements, by value."""

    shape: dict[ir.Value, tuple[Extent, ...]] = dataclasses.field(default_factory=dict)
    elements: dict[ir.Value, np.ndarray] = dataclasses.field(default_factory=dict)

    def dims(self, value: ir.Value) -> ir.Shape | None:
        """The shape as the IR writes it: numbers, names and expressions; unknown where not known."""
        extents = self.shape.get(value)
        return None if extents is None else ir.Shape([to_dim(e) for e in extents])


@functools.lru_cache(maxsize=4096)
def parse(text: str) -> Extent:
    """Expression for a dim's text; a text that is no expression is one opaque symbol."""
    try:
        return ir.SymbolicDim(text)._expr
    except Exception:  # onnx_ir raises several types on names such as "input.1_dim_0"
        return sympy.Symbol(text, integer=True, positive=True)


def fresh() -> Extent:
    """An extent about which nothing is known."""
    return sympy.Dummy("d", integer=True, nonnegative=True)


def to_expr(extent: int | ir.SymbolicDim | str | None) -> Extent:
    """Expression for one dim of an IR shape."""
    if isinstance(extent, ir.SymbolicDim):
        extent = extent.value
    if isinstance(extent, (int, np.integer)):
        return sympy.Integer(int(extent))
    return fresh() if extent is None else parse(extent)


def to_dim(extent: Extent) -> int | str | None:
    """Inverse of :func:`to_expr`; None where a ``Dummy`` is left."""
    if extent.is_Integer:
        return int(extent)
    return None if extent.atoms(sympy.Dummy) else str(extent)


def known(elements: np.ndarray) -> list[int] | None:
    """The elements as numbers, when all of them are numbers."""
    flat = list(elements.reshape(-1))
    return [int(e) for e in flat] if all(getattr(e, "is_Integer", False) for e in flat) else None


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
        result.shape[value] = tuple(sympy.Integer(int(d)) for d in value.const_value.shape)
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
            elements = _ELEMENTS.get(node.op_type, _no_elements)(result, node)
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
            to_expr(d)
            if e.atoms(sympy.Dummy) and (isinstance(d, int) or d.value is not None)
            else e
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
    result.shape[value] = tuple(sympy.Integer(int(d)) for d in tensor.shape)
    if tensor.dtype in (ir.DataType.INT64, ir.DataType.INT32) and tensor.size <= LIMIT:
        flat = [sympy.Integer(int(n)) for n in tensor.numpy().reshape(-1)]
        result.elements[value] = np.array(flat, dtype=object).reshape(tuple(tensor.shape))


# --- elements of integer tensors ---------------------------------------------------------------


def _get(result: Shapes, node: ir.Node, index: int) -> np.ndarray:
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        raise KeyError(index)
    return result.elements[value]


def _no_elements(result: Shapes, node: ir.Node) -> None:
    return None


def _shape_op(result: Shapes, node: ir.Node) -> np.ndarray:
    extents = result.shape[_input(node, 0)]
    start, end = attribute(node, "start", 0), attribute(node, "end", len(extents))
    return np.array(list(extents)[start:end], dtype=object)


def _size_op(result: Shapes, node: ir.Node) -> np.ndarray:
    return np.array(sympy.Mul(*result.shape[_input(node, 0)]), dtype=object)


def _binary(operation: Callable[[Any, Any], Any]) -> Callable[[Shapes, ir.Node], np.ndarray]:
    def elements(result: Shapes, node: ir.Node) -> np.ndarray:
        first, second = np.broadcast_arrays(_get(result, node, 0), _get(result, node, 1))
        pairs = zip(first.reshape(-1), second.reshape(-1), strict=True)
        return _pack([operation(a, b) for a, b in pairs], first.shape)

    return elements


def _pack(items: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    packed = np.empty(len(items), dtype=object)
    packed[:] = items
    return packed.reshape(shape)


def _divide(first: Extent, second: Extent) -> Extent:
    quotient = sympy.simplify(first / second)
    if first.is_Integer and second.is_Integer:
        return sympy.Integer(int(first) // int(second))  # shapes are never negative
    return quotient if quotient.is_integer else sympy.floor(first / second)


def _gather(result: Shapes, node: ir.Node) -> np.ndarray:
    indices = known(_get(result, node, 1))
    if indices is None:
        raise KeyError("indices")
    where = np.array(indices).reshape(_get(result, node, 1).shape)
    return np.asarray(
        np.take(_get(result, node, 0), where, axis=attribute(node, "axis", 0)), dtype=object
    )


def _slice(result: Shapes, node: ir.Node) -> np.ndarray:
    data = _get(result, node, 0)
    starts, ends = known(_get(result, node, 1)), known(_get(result, node, 2))
    steps = known(_get(result, node, 4)) if len(node.inputs) > 4 else [1]
    if data.ndim != 1 or starts is None or ends is None or steps is None:
        raise KeyError("slice")
    return data[slice(starts[0], ends[0] if ends[0] > -(2**31) else None, steps[0])]


def _concat(result: Shapes, node: ir.Node) -> np.ndarray:
    parts = [_get(result, node, i) for i in range(len(node.inputs))]
    return np.concatenate(parts, axis=attribute(node, "axis", 0))


def _same(result: Shapes, node: ir.Node) -> np.ndarray:
    return _get(result, node, 0)


def _cast(result: Shapes, node: ir.Node) -> np.ndarray:
    to = attribute(node, "to")
    if node.op_type == "CastLike" and node.inputs[1] is not None:
        to = node.inputs[1].dtype
    if to not in (ir.DataType.INT64, ir.DataType.INT32):
        raise KeyError("cast")
    return _get(result, node, 0)


def _reshape_elements(result: Shapes, node: ir.Node) -> np.ndarray:
    target = known(_get(result, node, 1))
    if target is None:
        raise KeyError("shape")
    return _get(result, node, 0).reshape(target)


def _unsqueeze_elements(result: Shapes, node: ir.Node) -> np.ndarray:
    axes = known(_get(result, node, 1))
    if axes is None:
        raise KeyError("axes")
    return np.expand_dims(_get(result, node, 0), tuple(axes))


def _squeeze_elements(result: Shapes, node: ir.Node) -> np.ndarray:
    data = _get(result, node, 0)
    if len(node.inputs) < 2 or node.inputs[1] is None:
        return np.asarray(np.squeeze(data), dtype=object)
    axes = known(_get(result, node, 1))
    return np.asarray(np.squeeze(data, tuple(axes or ())), dtype=object)


def _where(result: Shapes, node: ir.Node) -> np.ndarray:
    condition, first, second = np.broadcast_arrays(*(_get(result, node, i) for i in range(3)))
    if any(c not in (sympy.true, sympy.false, True, False) for c in condition.reshape(-1)):
        raise KeyError("condition")
    triples = zip(condition.reshape(-1), first.reshape(-1), second.reshape(-1), strict=True)
    return _pack([a if c == True else b for c, a, b in triples], first.shape)  # noqa: E712


def _equal(first: Extent, second: Extent) -> Any:
    difference = sympy.simplify(first - second)
    if difference == 0:
        return sympy.true
    # a symbol is a positive extent, so it never equals the -1 that means "keep"
    return sympy.false if difference.is_nonzero else None


def _constant_of_shape(result: Shapes, node: ir.Node) -> np.ndarray:
    target = known(_get(result, node, 0))
    fill = attribute(node, "value")
    number = fill.numpy().reshape(-1)[0] if fill is not None else 0
    if target is None or len(target) > 1 or (target and target[0] > LIMIT):
        raise KeyError("shape")
    if fill is None or fill.dtype not in (ir.DataType.INT64, ir.DataType.INT32):
        raise KeyError("dtype")
    count = target[0] if target else 1
    return _pack([sympy.Integer(int(number))] * count, tuple(target))


_ELEMENTS: dict[str, Callable[[Shapes, ir.Node], np.ndarray | None]] = {
    "Shape": _shape_op,
    "Size": _size_op,
    "Add": _binary(lambda a, b: sympy.expand(a + b)),
    "Sub": _binary(lambda a, b: sympy.expand(a - b)),
    "Mul": _binary(lambda a, b: sympy.expand(a * b)),
    "Div": _binary(_divide),
    "Min": _binary(sympy.Min),
    "Max": _binary(sympy.Max),
    "Equal": _binary(_equal),
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Identity": _same,
    "Cast": _cast,
    "CastLike": _cast,
    "Reshape": _reshape_elements,
    "Unsqueeze": _unsqueeze_elements,
    "Squeeze": _squeeze_elements,
    "Where": _where,
    "ConstantOfShape": _constant_of_shape,
}


# --- shapes ------------------------------------------------------------------------------------


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        raise KeyError(index)
    return value


def _own_shape(result: Shapes, node: ir.Node) -> bool:
    """Shapes of ops whose extents are arithmetic, which the library cannot express."""
    rule = _SHAPES.get(node.op_type)
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


def _reshape_shape(result: Shapes, node: ir.Node) -> list[Extent]:
    data, target = result.shape[_input(node, 0)], list(_get(result, node, 1).reshape(-1))
    if not attribute(node, "allowzero", 0):
        target = [data[i] if t == 0 else t for i, t in enumerate(target)]
    if sum(1 for t in target if t == -1) == 1:
        rest = sympy.Mul(*[t for t in target if t != -1])
        missing = sympy.simplify(sympy.Mul(*data) / rest) if rest != 0 else fresh()
        target = [missing if t == -1 else t for t in target]
    return target


def _expand_shape(result: Shapes, node: ir.Node) -> list[Extent]:
    data, target = list(result.shape[_input(node, 0)]), list(_get(result, node, 1).reshape(-1))
    size = max(len(data), len(target))
    one = [sympy.Integer(1)]
    data, target = one * (size - len(data)) + data, one * (size - len(target)) + target
    return [
        d if t == 1 or t == d else (t if d == 1 else (d if d.is_Integer else t))
        for d, t in zip(data, target, strict=True)
    ]


def _concat_shape(result: Shapes, node: ir.Node) -> list[Extent]:
    shapes = [result.shape[_input(node, i)] for i in range(len(node.inputs))]
    axis = attribute(node, "axis") % len(shapes[0])
    extents = []
    for index, column in enumerate(zip(*shapes, strict=True)):
        if index == axis:
            extents.append(sum(column))
        else:
            extents.append(next((e for e in column if e.is_Integer), column[0]))
    return extents


def _slice_shape(result: Shapes, node: ir.Node) -> list[Extent]:
    data = list(result.shape[_input(node, 0)])
    starts, ends = list(_get(result, node, 1)), list(_get(result, node, 2))
    has_axes = len(node.inputs) > 3 and node.inputs[3] is not None
    has_steps = len(node.inputs) > 4 and node.inputs[4] is not None
    axes = known(_get(result, node, 3)) if has_axes else list(range(len(starts)))
    steps = known(_get(result, node, 4)) if has_steps else [1] * len(starts)
    if axes is None or steps is None:
        raise KeyError("axes")
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        data[axis] = _slice_extent(data[axis], start, end, step)
    return data


def _slice_extent(extent: Extent, start: Extent, end: Extent, step: int) -> Extent:
    if all(e.is_Integer for e in (extent, start, end)):
        last = None if step < 0 and int(end) < -(2**31) else int(end)
        return sympy.Integer(len(range(int(extent))[slice(int(start), last, step)]))
    whole = end.is_Integer and int(end) >= 2**31 - 1
    if step == 1 and start == 0 and (whole or end == extent):
        return extent
    if step == 1 and start.is_Integer and int(start) < 0 and whole:
        return fresh()  # the last n of an extent that may be shorter than n
    if step == 1 and whole and start.is_nonnegative and (extent - start).is_nonnegative:
        return extent - start
    if step == 1 and start == 0 and end.is_nonnegative and (extent - end).is_nonnegative:
        return end
    return fresh()


def _unsqueeze_shape(result: Shapes, node: ir.Node) -> list[Extent]:
    data, axes = list(result.shape[_input(node, 0)]), known(_get(result, node, 1))
    if axes is None:
        raise KeyError("axes")
    size = len(data) + len(axes)
    places = {a % size for a in axes}
    rest = iter(data)
    return [sympy.Integer(1) if i in places else next(rest) for i in range(size)]


def _range_shape(result: Shapes, node: ir.Node) -> list[Extent]:
    start, limit, delta = (_get(result, node, i).item() for i in range(3))
    extent = sympy.expand((limit - start) / delta)
    if delta != 1 or not extent.is_nonnegative:
        raise KeyError("range")
    return [extent]


def _filled_shape(result: Shapes, node: ir.Node) -> list[Extent]:
    return list(_get(result, node, 0).reshape(-1))


def _tile_shape(result: Shapes, node: ir.Node) -> list[Extent]:
    pairs = zip(result.shape[_input(node, 0)], _get(result, node, 1).reshape(-1), strict=True)
    return [extent * times for extent, times in pairs]


def _attention_shape(result: Shapes, node: ir.Node) -> None:
    """Present keys and values are the past ones with the new ones appended."""
    for output, past, new in ((1, 4, 1), (2, 5, 2)):
        if len(node.outputs) <= output or len(node.inputs) <= past or node.inputs[past] is None:
            continue
        before, added = result.shape.get(_input(node, past)), result.shape.get(_input(node, new))
        if before is None or added is None or len(before) != 4:
            continue
        length = added[2] if len(added) == 4 else added[1]
        extents = (before[0], before[1], sympy.expand(before[2] + length), before[3])
        result.shape[node.outputs[output]] = extents
    return None


_SHAPES: dict[str, Callable[[Shapes, ir.Node], list[Extent] | None]] = {
    "Reshape": _reshape_shape,
    "Expand": _expand_shape,
    "Concat": _concat_shape,
    "Slice": _slice_shape,
    "Unsqueeze": _unsqueeze_shape,
    "Range": _range_shape,
    "ConstantOfShape": _filled_shape,
    "Tile": _tile_shape,
}


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
        tensor = value.const_value
        if tensor is not None and tensor.size <= LIMIT:
            data[value.name] = ir.serde.serialize_tensor(tensor)
    try:
        schema = onnx.defs.get_schema(node.op_type, OPSET, "")
        inferred = onnx.shape_inference.infer_node_outputs(
            schema, ir.serde.serialize_node(node), types, data,
            opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        )  # fmt: skip
    except Exception:  # the library raises RuntimeError subclasses that it does not export
        inferred = {}
    for value in node.outputs:
        found = inferred.get(value.name or "")
        if found is not None:
            _take(result, value, found, names)
    if node.op_type == "Attention":
        _attention_shape(result, node)


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
            name = str(extent)
            if extent.atoms(sympy.Dummy):
                name = f"?{abs(hash(extent))}"
            names[name] = extent
            proto.tensor_type.shape.dim.add().dim_param = name
    return proto


def _take(
    result: Shapes, value: ir.Value, proto: onnx.TypeProto, names: dict[str, Extent]
) -> None:
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
