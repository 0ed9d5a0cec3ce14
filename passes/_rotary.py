"""The parts of a rotary embedding: halves, rotated copies and the tables of cosines and sines."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from hal.passes._edit import (
    Editor,
    attribute,
    dim,
    ints,
    is_constant,
    is_op,
    is_scalar,
    operand_orders,
    producer,
    rank,
    same_extents,
    scalar,
)


@dataclasses.dataclass(frozen=True)
class Section:
    """``source[..., start:stop:step]`` along the last axis."""

    source: ir.Value
    start: int
    stop: int
    step: int


def section(value: ir.Value | None) -> Section | None:
    """Read ``value`` as a part of another value along its last axis."""
    node = producer(value, "Slice", "Split", "Gather", "Squeeze")
    if node is None or value is None:
        return None
    if node.op_type == "Slice":
        return _sliced(node)
    if node.op_type == "Split":
        return _split(node, value)
    return _picked(node)


def _sliced(node: ir.Node) -> Section | None:
    source = node.inputs[0]
    size, extent = rank(source), dim(source, -1)
    given = [ints(v) if v is not None else None for v in node.inputs[1:]]
    starts, stops = given[0], given[1]
    axes = given[2] if len(given) > 2 else None
    steps = given[3] if len(given) > 3 else [1]
    if source is None or size is None or extent is None or axes is None or steps is None:
        return None
    if starts is None or stops is None or len(axes) != 1 or axes[0] % size != size - 1:
        return None
    if steps[0] < 1:
        return None
    start, stop, step = slice(starts[0], stops[0], steps[0]).indices(extent)
    return Section(source, start, stop, step)


def _split(node: ir.Node, value: ir.Value) -> Section | None:
    source = node.inputs[0]
    size = rank(source)
    if source is None or size is None or attribute(node, "axis", 0) % size != size - 1:
        return None
    extents = [dim(v, -1) for v in node.outputs]
    if None in extents:
        return None
    index = next(i for i, v in enumerate(node.outputs) if v is value)
    start = sum(e or 0 for e in extents[:index])
    return Section(source, start, start + (extents[index] or 0), 1)


def _picked(node: ir.Node) -> Section | None:
    """Element 0 or 1 along the last axis of ``[..., n, 2]``: every other dim of ``[..., 2n]``."""
    if node.op_type == "Gather":
        size, index = rank(node.inputs[0]), scalar(node.inputs[1])
        if size is None or index is None or rank(node.inputs[1]) != 0:
            return None
        if attribute(node, "axis", 0) % size != size - 1:
            return None
        view, start = node.inputs[0], int(index)
    else:
        removed, size = ints(node.inputs[1]) if len(node.inputs) > 1 else None, rank(node.inputs[0])
        part = section(node.inputs[0])
        if removed is None or size is None or part is None or len(removed) != 1:
            return None
        if removed[0] % size != size - 1 or part.stop - part.start != 1:
            return None
        view, start = part.source, part.start
    reshape = producer(view, "Reshape")
    if reshape is None or reshape.inputs[0] is None or dim(view, -1) != 2 or start not in (0, 1):
        return None
    source, count = reshape.inputs[0], dim(view, -2)
    whole = dim(source, -1)
    if count is None or whole != 2 * count or rank(view) != (rank(source) or 0) + 1:
        return None
    return Section(source, start, whole, 2)


def pair(first: ir.Value | None, second: ir.Value | None) -> tuple[ir.Value, bool] | None:
    """``(x, interleaved)`` if the values are both halves, or the even and odd dims, of ``x``."""
    one, two = section(first), section(second)
    if one is None or two is None or one.source is not two.source or one.step != two.step:
        return None
    whole = dim(one.source, -1)
    if whole is None or whole % 2:
        return None
    if one.step == 1:
        halves = (one.start, one.stop, two.start, two.stop) == (0, whole // 2, whole // 2, whole)
        return (one.source, False) if halves else None
    alternate = one.step == 2 and (one.start, two.start) == (0, 1) and two.stop == whole
    return (one.source, True) if alternate and one.stop >= whole - 1 else None


def stacked(value: ir.Value) -> tuple[ir.Value, ir.Value, bool] | None:
    """``(a, b, interleaved)`` if ``value`` puts ``a`` and ``b`` side by side or dim by dim."""
    node = producer(value, "Concat", "Reshape")
    if node is None:
        return None
    if node.op_type == "Concat":
        size = rank(value)
        if len(node.inputs) != 2 or size is None or attribute(node, "axis", 0) % size != size - 1:
            return None
        first, second = node.inputs
        return (first, second, False) if first is not None and second is not None else None
    inner = producer(node.inputs[0], "Concat")
    if inner is None or len(inner.inputs) != 2 or dim(inner.outputs[0], -1) != 2:
        return None
    size = rank(inner.outputs[0])
    if size is None or attribute(inner, "axis", 0) % size != size - 1 or rank(value) != size - 1:
        return None
    if dim(value, -1) != 2 * (dim(inner.outputs[0], -2) or 0):
        return None
    first, second = (_last_unsqueezed(v) for v in inner.inputs)
    return (first, second, True) if first is not None and second is not None else None


def _last_unsqueezed(value: ir.Value | None) -> ir.Value | None:
    node, size = producer(value, "Unsqueeze"), rank(value)
    axes = ints(node.inputs[1]) if node is not None else None
    if node is None or axes is None or size is None or [a % size for a in axes] != [size - 1]:
        return None
    return node.inputs[0]


def negated(value: ir.Value | None) -> ir.Value | None:
    """``x`` if ``value`` is ``-x``."""
    node = producer(value, "Neg", "Mul")
    if node is None:
        return None
    if node.op_type == "Neg":
        return node.inputs[0]
    return next((a for a, b in operand_orders(node) if is_scalar(b, -1.0)), None)


# --- tables ------------------------------------------------------------------------------------


def cache(
    edit: Editor, table: ir.Value, x: ir.Value, interleaved: bool, halved: bool
) -> tuple[ir.Value, int] | None:
    """Bring a table that multiplies ``x`` (4-D) to ``[batch, sequence, dims / 2]``.

    Returns the table and the axis of ``x`` that holds the heads (1 or 2), or None when the table
    varies over heads, or its halves are not provably equal.
    """
    axis = _head_axis(table, x)
    half = table if halved else _half(edit, table, interleaved)
    if axis is None or half is None:
        return None
    missing = 4 - (rank(table) or 0)
    if missing:
        half = edit.op("Unsqueeze", [half, edit.constant(list(range(missing)), "axes", np.int64)])
    squeezed = edit.op("Squeeze", [half, edit.constant([axis], "axes", np.int64)])
    squeezed.type = table.type
    assert x.shape is not None
    assert table.shape is not None
    batch: int | ir.SymbolicDim = 1 if missing else table.shape[0]
    sequence = x.shape[3 - axis]
    squeezed.shape = ir.Shape([batch, sequence, (dim(x, -1) or 0) // 2])
    if same_extents([batch], [x.shape[0]]):
        return squeezed, axis
    return (with_batch(edit, squeezed, x), axis) if batch == 1 else None


def _head_axis(table: ir.Value, x: ir.Value) -> int | None:
    size = rank(table)
    if size is None or size < 2 or size > 4 or table.shape is None or x.shape is None:
        return None
    padded: list[int | ir.SymbolicDim] = [*[1] * (4 - size), *table.shape]
    if padded[0] != 1 and not same_extents(padded[:1], x.shape[:1]):
        return None
    if padded[1] == 1 and same_extents(padded[2:3], x.shape[2:3]):
        return 1
    return 2 if padded[2] == 1 and same_extents(padded[1:2], x.shape[1:2]) else None


def with_batch(edit: Editor, table: ir.Value, x: ir.Value) -> ir.Value:
    """Repeat a table ``[1, sequence, dims]`` for each sequence of the batch of ``x``."""
    assert x.shape is not None
    assert table.shape is not None
    batch = x.shape[0]
    if isinstance(batch, int):
        extent = edit.constant([batch], "batch", np.int64)
    else:
        source, axis = _extent_source(edit, batch, x)
        extent = edit.op("Shape", [source], {"start": axis, "end": axis + 1})
    ones = edit.constant([1, 1], "ones", np.int64)
    target = edit.op("Concat", [extent, ones], {"axis": 0})
    repeated = edit.op("Expand", [table, target])
    repeated.type, repeated.shape = table.type, ir.Shape([batch, *table.shape[1:]])
    return repeated


def _extent_source(edit: Editor, extent: ir.SymbolicDim, x: ir.Value) -> tuple[ir.Value, int]:
    """A graph input that has this extent, so that all layers share one computation of it."""
    if extent.value is not None:
        for value in edit.graph.graph.inputs:
            for axis, found in enumerate(value.shape or ()):
                if found == extent:
                    return value, axis
    return x, 0


UNARY = ("Cos", "Sin", "Cast", "Identity", "Neg")


def _half(edit: Editor, value: ir.Value, interleaved: bool) -> ir.Value | None:
    """The distinct half of a table whose dims repeat, or None when that cannot be shown."""
    whole = dim(value, -1)
    if whole is None or whole % 2:
        return None
    if is_constant(value):
        return _constant_half(edit, value, interleaved)
    node = value.producer()
    if node is None or not is_op(node, *UNARY, *_HALVERS):
        return None
    if is_op(node, *UNARY):
        return _rebuilt(edit, node, [_half_of(edit, node.inputs[0], interleaved)])
    return _HALVERS[node.op_type](edit, node, interleaved)


def _half_of(edit: Editor, value: ir.Value | None, interleaved: bool) -> ir.Value | None:
    return _half(edit, value, interleaved) if value is not None else None


def _rebuilt(edit: Editor, node: ir.Node, inputs: list[ir.Value | None]) -> ir.Value | None:
    if inputs[0] is None:
        return None
    attributes = {k: a.value for k, a in node.attributes.items()}
    made = edit.op(node.op_type, inputs, attributes, before=node)
    old = node.outputs[0]
    if old.shape is not None:
        made.shape = ir.Shape([*old.shape[:-1], (dim(old, -1) or 0) // 2])
    made.type = old.type
    return made


def _constant_half(edit: Editor, value: ir.Value, interleaved: bool) -> ir.Value | None:
    tensor = value.const_value
    if tensor is None or tensor.nbytes > 2**26:
        return None
    table = tensor.numpy()
    middle = table.shape[-1] // 2
    if interleaved:
        first, second = table[..., 0::2], table[..., 1::2]
    else:
        first, second = table[..., :middle], table[..., middle:]
    if not np.array_equal(first, second):
        return None
    return edit.tensor(ir.Tensor(np.ascontiguousarray(first)), f"{value.name}.half")


def _concat_half(_edit: Editor, node: ir.Node, interleaved: bool) -> ir.Value | None:
    parts = stacked(node.outputs[0])
    if parts is not None and parts[0] is parts[1]:
        return parts[0] if parts[2] == interleaved else None
    return None


def _reshape_half(edit: Editor, node: ir.Node, interleaved: bool) -> ir.Value | None:
    """``reshape(expand(unsqueeze(f, -1), [..., 2]))`` repeats each dim twice."""
    found = _concat_half(edit, node, interleaved)
    if found is not None or not interleaved:
        return found
    repeated = producer(node.inputs[0], "Expand", "Tile")
    if repeated is None or dim(repeated.outputs[0], -1) != 2 or dim(repeated.inputs[0], -1) != 1:
        return None
    source = _last_unsqueezed(repeated.inputs[0])
    old = node.outputs[0]
    if source is None or source.shape is None or old.shape is None:
        return None
    same = same_extents(source.shape[:-1], old.shape[:-1])
    return source if same and dim(old, -1) == 2 * (dim(source, -1) or 0) else None


def _unsqueeze_half(edit: Editor, node: ir.Node, interleaved: bool) -> ir.Value | None:
    axes, size = ints(node.inputs[1]), rank(node.outputs[0])
    if axes is None or size is None or size - 1 in [a % size for a in axes]:
        return None
    return _rebuilt(edit, node, [_half_of(edit, node.inputs[0], interleaved), node.inputs[1]])


def _product_half(edit: Editor, node: ir.Node, interleaved: bool) -> ir.Value | None:
    for source, other in operand_orders(node):
        if dim(other, -1) == 1 or rank(other) == 0:
            return _rebuilt(edit, node, [_half_of(edit, source, interleaved), other])
    return None


def _gather_half(edit: Editor, node: ir.Node, interleaved: bool) -> ir.Value | None:
    size = rank(node.inputs[0])
    if size is None or attribute(node, "axis", 0) % size == size - 1:
        return None
    return _rebuilt(edit, node, [_half_of(edit, node.inputs[0], interleaved), node.inputs[1]])


def _slice_half(edit: Editor, node: ir.Node, interleaved: bool) -> ir.Value | None:
    size, axes = rank(node.inputs[0]), ints(node.inputs[3]) if len(node.inputs) > 3 else None
    if size is None or axes is None or size - 1 in [a % size for a in axes]:
        return None
    return _rebuilt(edit, node, [_half_of(edit, node.inputs[0], interleaved), *node.inputs[1:]])


_HALVERS = {
    "Concat": _concat_half,
    "Reshape": _reshape_half,
    "Unsqueeze": _unsqueeze_half,
    "Mul": _product_half,
    "Gather": _gather_half,
    "Slice": _slice_half,
}
