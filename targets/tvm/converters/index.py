"""Ops that read or write elements at computed places: gather, scatter, one-hot, top-k."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax, te, tirx, topi

from hal.targets.tvm import contents
from hal.targets.tvm.converters.elementwise import maximum, minimum, truth
from hal.targets.tvm.converters.shape import reshaped
from hal.targets.tvm.dims import Dim, Refused, product
from hal.targets.tvm.dtypes import NUMBERS
from hal.targets.tvm.lowering import Op, Operand


def wrapped(index: Any, extent: Dim) -> Any:
    """A possibly negative index as int64 counted from the front.

    An index out of range is undefined in ONNX; here it is held inside, so that nothing foreign is
    read or written.
    """
    index = index.astype("int64")
    limit = tirx.const(extent, "int64") if isinstance(extent, int) else extent
    index = tirx.Select(index < 0, index + limit, index)
    return tirx.max(tirx.min(index, limit - 1), tirx.const(0, "int64"))


def gather(op: Op) -> Operand:
    """``Gather`` along one axis."""
    x, indices = op.input(0), op.input(1)
    axis = op.axis(0, x.rank)
    places = contents.integers(indices.content)
    if x.content is not None and places is not None:
        assert indices.content is not None
        picked = np.take(x.content, np.array(places).reshape(indices.content.shape), axis=axis)
        return op.context.from_content(np.asarray(picked, object), x.dtype)
    dims = [*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]]
    span = indices.rank

    def body(tensor: Any, where: Any, i: Any) -> Any:
        place = wrapped(where(*i[axis : axis + span]), x.shape[axis])
        return tensor(*i[:axis], place, *i[axis + span :])

    return op.compute(dims, body, x, indices, dtype=x.dtype)


def gather_elements(op: Op) -> Operand:
    """``GatherElements``."""
    x, indices = op.input(0), op.input(1)
    axis = op.axis(0, x.rank)

    def body(tensor: Any, where: Any, i: Any) -> Any:
        picked = list(i)
        picked[axis] = wrapped(where(*i), x.shape[axis])
        return tensor(*picked)

    return op.compute(indices.shape, body, x, indices, dtype=x.dtype)


def gather_nd(op: Op) -> Operand:
    """``GatherND`` with batch dims."""
    x, indices = op.input(0), op.input(1)
    batch = op.attribute("batch_dims", 0)
    depth = indices.shape[-1]
    if not isinstance(depth, int):
        raise Refused("GatherND with a dynamic index depth")
    lead = indices.rank - 1
    dims = [*indices.shape[:-1], *x.shape[batch + depth :]]

    def body(tensor: Any, where: Any, i: Any) -> Any:
        places = [wrapped(where(*i[:lead], d), x.shape[batch + d]) for d in range(depth)]
        return tensor(*i[:batch], *places, *i[lead:])

    return op.compute(dims, body, x, indices, dtype=x.dtype)


def one_hot(op: Op) -> Operand:
    """``OneHot``; the depth must be known or declared. Out of range, an index has no "on" value."""
    indices, values = op.require(0, NUMBERS), op.input(2)
    depth = op.constant(1)
    axis = op.attribute("axis", -1)
    axis = axis + indices.rank + 1 if axis < 0 else axis
    declared = op.declared()
    if depth is None and declared is None:
        raise Refused("the depth of OneHot must be known at compile time")
    count = int(depth.reshape(())) if depth is not None else declared[axis]  # type: ignore[index]
    dims = [*indices.shape[:axis], count, *indices.shape[axis:]]

    def body(where: Any, value: Any, i: Any) -> Any:
        place = where(*i[:axis], *i[axis + 1 :]).astype("int64")
        hit = tirx.Or(place == i[axis], place + _const(count) == i[axis])
        return tirx.Select(hit, value[1], value[0])

    return op.compute(dims, body, indices, values, dtype=values.dtype)


_COMBINE: dict[str, Callable[[Any, Any], Any]] = {
    "none": lambda old, new: new,
    "add": lambda old, new: old + new,
    "mul": lambda old, new: old * new,
    "max": maximum,
    "min": minimum,
}


def scatter_loop(
    op: Op,
    x: Operand,
    operands: Sequence[Operand],
    count: Dim,
    write: Callable[..., tuple[Any, Any]],
) -> Operand:
    """Copy ``x``, then for ``t < count`` store what ``write`` says, in order.

    ``write(out, tensors, t)`` gives the flat position in the result and the value.
    """
    if op.context.shaping.plain:
        raise Refused(f"{op.node.op_type} stores in order, which is one thread's work")
    total = op.symbols.simplify(product(x.shape))
    flat = [reshaped(op, o, [product(o.shape)]) for o in (x, *operands)]

    def kernel(*tensors: Any) -> Any:
        def generate(ins: Any, outs: Any) -> Any:
            from tvm.script.ir_builder import IRBuilder
            from tvm.script.ir_builder import tirx as T  # noqa: N812

            with IRBuilder() as builder, T.seq_scope():
                with T.serial(tirx.const(0, "int64"), _const(total)) as i:
                    T.buffer_store(outs[0], ins[0][i], [i])
                with T.serial(tirx.const(0, "int64"), _const(count)) as t:
                    place, value = write(outs[0], ins[1:], t)
                    T.buffer_store(outs[0], value, [place])
            return builder.get()

        return te.extern(
            [[_const(total)]], list(tensors), generate, name="scatter", dtype=[x.stored]
        )

    written = op.te(kernel, *flat, dtype=x.dtype)
    return reshaped(op, written, x.shape)


def _const(dim: Dim) -> Any:
    return tirx.const(dim, "int64") if isinstance(dim, int) else dim


def unravel(flat: Any, shape: Sequence[Dim]) -> list[Any]:
    """Indices of element ``flat`` of an array of ``shape``."""
    indices: list[Any] = []
    for dim in reversed(shape):
        indices.insert(0, tirx.floormod(flat, _const(dim)))
        flat = tirx.floordiv(flat, _const(dim))
    return indices


def ravel(indices: Sequence[Any], shape: Sequence[Dim]) -> Any:
    """Inverse of :func:`unravel`."""
    flat: Any = tirx.const(0, "int64")
    for index, dim in zip(indices, shape, strict=True):
        flat = flat * _const(dim) + index
    return flat


def scatter_elements(op: Op) -> Operand:
    """``ScatterElements`` (and the deprecated ``Scatter``)."""
    x, indices, updates = op.inputs()
    axis = op.axis(0, x.rank)
    combine = _COMBINE[op.attribute("reduction", "none")]
    if op.context.shaping.plain:
        return _gathered(op, axis, combine)

    def write(out: Any, tensors: Any, t: Any) -> tuple[Any, Any]:
        where, values = tensors
        picked = unravel(t, indices.shape)
        picked[axis] = wrapped(where[t], x.shape[axis])
        place = ravel(picked, x.shape)
        return place, combine(out[place], values[t])

    return scatter_loop(op, x, [indices, updates], product(indices.shape), write)


_FEW = 64
"""Most updates along an axis that each element looks through."""


def _gathered(op: Op, axis: int, combine: Callable[..., Any]) -> Operand:
    """``ScatterElements`` from the side of the results: each takes the updates that are for it."""
    x, indices, updates = op.inputs()
    count = indices.shape[axis]
    if not isinstance(count, int) or count > _FEW:
        raise Refused(f"ScatterElements of more than {_FEW} updates along its axis")
    others = [a for a in range(x.rank) if a != axis]

    def element(old: Any, where: Any, values: Any, i: Any) -> Any:
        inside = tirx.all(*(i[a] < _const(indices.shape[a]) for a in others))
        safe = [tirx.min(n, _const(indices.shape[a]) - 1) for a, n in enumerate(i)]
        result = old(*i)
        for t in range(count):
            place = [*safe[:axis], tirx.const(t, "int64"), *safe[axis + 1 :]]
            hit = tirx.And(inside, wrapped(where(*place), x.shape[axis]) == i[axis])
            result = tirx.Select(hit, combine(result, values(*place)), result)
        return result

    return op.compute(x.shape, element, x, indices, updates, dtype=x.dtype)


def scatter_nd(op: Op) -> Operand:
    """``ScatterND``."""
    x, indices, updates = op.inputs()
    combine = _COMBINE[op.attribute("reduction", "none")]
    depth = indices.shape[-1]
    if not isinstance(depth, int):
        raise Refused("ScatterND with a dynamic index depth")
    rest = product(x.shape[depth:])

    def write(out: Any, tensors: Any, t: Any) -> tuple[Any, Any]:
        where, values = tensors
        row, offset = tirx.floordiv(t, _const(rest)), tirx.floormod(t, _const(rest))
        places = [wrapped(where[row * depth + d], x.shape[d]) for d in range(depth)]
        place = ravel(places, x.shape[:depth]) * _const(rest) + offset
        return place, combine(out[place], values[t])

    return scatter_loop(op, x, [indices, updates], product(updates.shape), write)


def tensor_scatter(op: Op) -> Operand:
    """``TensorScatter``: write an update into a cache at a position per batch entry."""
    cache, update, position = op.input(0), op.input(1), op.optional(2)
    axis = op.axis(-2, cache.rank)
    circular = op.attribute("mode", "linear") == "circular"
    length = update.shape[axis]
    operands = [cache, update] + ([position] if position is not None else [])

    def body(old: Any, new: Any, *rest: Any) -> Any:
        *positions, i = rest
        first = positions[0][i[0]].astype("int64") if positions else tirx.const(0, "int64")
        offset = i[axis] - first
        if circular:
            offset = tirx.floormod(offset, _const(cache.shape[axis]))
        inside = tirx.And(offset >= 0, offset < _const(length))
        place = [offset if a == axis else index for a, index in enumerate(i)]
        return tirx.if_then_else(inside, new(*place), old(*i))

    return op.compute(cache.shape, body, *operands, dtype=cache.dtype)


def top_k(op: Op) -> list[Operand]:
    """``TopK``: rank of every element by counting those before it; stable."""
    x = op.require(0, NUMBERS)
    axis = op.axis(-1, x.rank)
    largest = bool(op.attribute("largest", 1))
    wanted = op.content(1)
    declared = op.declared()
    if wanted is not None:
        count = op.symbols.simplify(wanted.reshape(-1)[0])
    elif declared is not None:
        count = declared[axis]
    else:
        raise Refused("the k of TopK must be known at compile time")
    dims = [count if a == axis else d for a, d in enumerate(x.shape)]
    order = _ranks(op, x, axis, largest)

    def kernel(tensor: Any, rank: Any) -> Any:
        k = te.reduce_axis((0, tensor.shape[axis]), name="k")

        def place(*i: Any) -> Any:
            picked = [k if a == axis else index for a, index in enumerate(i)]
            hit = rank(*picked) == i[axis]
            return te.max(tirx.Select(hit, k.var.astype("int64"), tirx.const(0, "int64")), axis=k)

        where = te.compute([_const(d) for d in dims], place, name="where")
        values = te.compute(
            where.shape,
            lambda *i: tensor(*(where(*i) if a == axis else index for a, index in enumerate(i))),
            name="values",
        )
        return [values, where]

    values, where = op.te(kernel, x, order)
    return [Operand(x.dtype, values.shape, values.expr), where]


def _ranks(op: Op, x: Operand, axis: int, largest: bool) -> Operand:
    """How many elements come before each one along ``axis``."""

    def kernel(tensor: Any) -> Any:
        k = te.reduce_axis((0, tensor.shape[axis]), name="k")

        def element(*i: Any) -> Any:
            other = tensor(*(k if a == axis else index for a, index in enumerate(i)))
            own = tensor(*i)
            ahead = other > own if largest else other < own
            tie = tirx.And(other == own, k.var < i[axis])
            return te.sum(tirx.Or(ahead, tie).astype("int64"), axis=k)

        return te.compute(tensor.shape, element, name="rank")

    return op.te(kernel, x)


def compress(op: Op) -> Operand:
    """``Compress`` where the shape of the result is declared."""
    x, condition = op.input(0), op.input(1)
    declared = op.declared()
    axis = op.attribute("axis")
    if declared is None:
        raise Refused("the length of the result of Compress depends on data")
    if axis is None:
        x = reshaped(op, x, [product(x.shape)])
        axis = 0
    axis = axis + x.rank if axis < 0 else axis
    before = _counted(op, condition)

    def kernel(tensor: Any, keep: Any, rank: Any) -> Any:
        k = te.reduce_axis((0, keep.shape[0]), name="k")

        def place(i: Any) -> Any:
            hit = tirx.And(keep[k], rank[k] == i)
            return te.max(tirx.Select(hit, k.var.astype("int64"), tirx.const(0, "int64")), axis=k)

        where = te.compute((_const(declared[axis]),), place, name="where")
        return te.compute(
            [_const(d) for d in declared],
            lambda *i: tensor(*(where[index] if a == axis else index for a, index in enumerate(i))),
        )

    return op.te(kernel, x, condition, before, dtype=x.dtype)


def _counted(op: Op, condition: Operand) -> Operand:
    """Number of true elements before each position of a bool vector."""

    def kernel(keep: Any) -> Any:
        k = te.reduce_axis((0, keep.shape[0]), name="k")
        return te.compute(
            keep.shape,
            lambda i: te.sum(tirx.And(keep[k], k.var < i).astype("int64"), axis=k),
        )

    return op.te(kernel, condition)


def nonzero(op: Op) -> Operand:
    """``NonZero``; its length becomes a dim known at run time."""
    x = op.require(0, NUMBERS | {ir.DataType.BOOL})
    if x.rank == 0 or not all(isinstance(d, int) for d in x.shape):
        raise Refused("NonZero of a scalar or of a dynamic shape")
    declared = op.declared()
    if declared is None:
        raise Refused("the length of the result of NonZero depends on data")
    flat = reshaped(op, x, [product(x.shape)])
    hits = op.compute(flat.shape, lambda v, i: truth(v(*i)), flat, dtype=ir.DataType.BOOL)
    before = _counted(op, hits)

    def kernel(keep: Any, rank: Any) -> Any:
        k = te.reduce_axis((0, keep.shape[0]), name="k")
        where = te.compute(
            (_const(declared[1]),),
            lambda i: te.max(
                tirx.Select(
                    tirx.And(keep[k], rank[k] == i), k.var.astype("int64"), tirx.const(0, "int64")
                ),
                axis=k,
            ),
            name="where",
        )

        def element(axis: Any, i: Any) -> Any:
            places = unravel(where[i], x.shape)
            result = places[0]
            for a in range(1, x.rank):
                result = tirx.Select(axis == a, places[a], result)
            return result

        return te.compute([_const(d) for d in declared], element)

    return op.te(kernel, hits, before)


CONVERTERS: dict[str, Callable[[Op], Any]] = {
    "Gather": gather,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "OneHot": one_hot,
    "ScatterElements": scatter_elements,
    "Scatter": scatter_elements,
    "ScatterND": scatter_nd,
    "TensorScatter": tensor_scatter,
    "TopK": top_k,
    "Compress": compress,
    "NonZero": nonzero,
}
"""Converters of this family by op type."""

__all__ = ["CONVERTERS", "ravel", "relax", "scatter_loop", "topi", "unravel", "wrapped"]
