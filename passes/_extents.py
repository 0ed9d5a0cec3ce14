"""How ops compute extents: elements of small integer tensors, and shapes that need arithmetic.

Two tables by op type. A rule reads what is known so far and returns the elements of the node's
first output (:data:`ELEMENTS`) or its extents (:data:`SHAPES`); it raises ``KeyError`` when it
needs something that is not known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import sympy

from hal.passes._dims import LIMIT, Extent, Shapes, fresh, known, quotient, with_zeros
from hal.passes._edit import attribute

# --- elements of integer tensors ---------------------------------------------------------------


def _get(result: Shapes, node: ir.Node, index: int) -> np.ndarray:
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        raise KeyError(index)
    return result.elements[value]


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
    exact = quotient(first, second)
    if first.is_Integer and second.is_Integer:
        return sympy.Integer(int(first) // int(second))  # shapes are never negative
    return exact if exact.is_integer else sympy.floor(first / second)


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
    difference = sympy.expand(first - second)
    if difference == 0:
        return sympy.true
    # an extent is never negative, so it never equals the -1 that means "keep"
    return sympy.false if with_zeros(difference).is_nonzero else None


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


ELEMENTS: dict[str, Callable[[Shapes, ir.Node], np.ndarray | None]] = {
    "Shape": _shape_op,
    "Size": _size_op,
    "Add": _binary(lambda a, b: sympy.expand(a + b)),
    "Sub": _binary(lambda a, b: sympy.expand(a - b)),
    "Mul": _binary(lambda a, b: sympy.expand(a * b)),
    "Div": _binary(_divide),
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


def _reshape_shape(result: Shapes, node: ir.Node) -> list[Extent]:
    data, target = result.shape[_input(node, 0)], list(_get(result, node, 1).reshape(-1))
    if not attribute(node, "allowzero", 0):
        target = [data[i] if t == 0 else t for i, t in enumerate(target)]
    if sum(1 for t in target if t == -1) == 1:
        rest = sympy.Mul(*[t for t in target if t != -1])
        missing = quotient(sympy.Mul(*data), rest) if rest != 0 else fresh()
        target = [missing if t == -1 else t for t in target]
    return target


def _expand_shape(result: Shapes, node: ir.Node) -> list[Extent]:
    data, target = list(result.shape[_input(node, 0)]), list(_get(result, node, 1).reshape(-1))
    size = max(len(data), len(target))
    one = [sympy.Integer(1)]
    data, target = one * (size - len(data)) + data, one * (size - len(target)) + target
    return [
        d if t in (1, d) else (t if d == 1 or t.is_Integer else (d if d.is_Integer else fresh()))
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
    if step == 1 and whole and start.is_nonnegative and with_zeros(extent - start).is_nonnegative:
        return extent - start
    if step == 1 and start == 0 and end.is_nonnegative and with_zeros(extent - end).is_nonnegative:
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
    if delta != 1 or not with_zeros(extent).is_nonnegative:
        raise KeyError("range")
    return [extent]


def _filled_shape(result: Shapes, node: ir.Node) -> list[Extent]:
    return list(_get(result, node, 0).reshape(-1))


def _tile_shape(result: Shapes, node: ir.Node) -> list[Extent]:
    pairs = zip(result.shape[_input(node, 0)], _get(result, node, 1).reshape(-1), strict=True)
    return [extent * times for extent, times in pairs]


SHAPES: dict[str, Callable[[Shapes, ir.Node], list[Extent] | None]] = {
    "Reshape": _reshape_shape,
    "Expand": _expand_shape,
    "Concat": _concat_shape,
    "Slice": _slice_shape,
    "Unsqueeze": _unsqueeze_shape,
    "Range": _range_shape,
    "ConstantOfShape": _filled_shape,
    "Tile": _tile_shape,
}
