"""Ops that move elements without arithmetic: reshape, transpose, concat, expand, tile."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax, te, tirx

from hal.targets.tvm import contents
from hal.targets.tvm.converters.elementwise import broadcast_index
from hal.targets.tvm.dims import Dim, Refused, at_least, floordiv, product
from hal.targets.tvm.lowering import CONTENT_LIMIT, Op, Operand


def reshaped(op: Op, x: Operand, dims: Sequence[Dim]) -> Operand:
    """``x`` with other dims and the same elements."""
    dims = tuple(op.symbols.simplify(d) for d in dims)
    if len(dims) == x.rank and all(
        op.symbols.equal(a, b) for a, b in zip(dims, x.shape, strict=True)
    ):
        return x
    if x.content is not None and all(isinstance(d, int) for d in dims):
        return op.context.from_content(x.content.reshape(dims), x.dtype)
    if x.reshaped_from is not None:  # two in a row would be fused to a copy; one is a view
        return reshaped(op, x.reshaped_from, dims)
    result = op.context.emit(relax.op.reshape(op.context.expr(x), list(dims)), x.dtype)
    result.reshaped_from = x
    return result


def runtime_dims(op: Op, operand: Operand) -> list[Dim]:
    """Dims that a computed int64 vector holds, as new symbols bound when it is known."""
    if operand.rank != 1 or not isinstance(operand.shape[0], int):
        raise Refused("a shape whose rank is unknown")
    if op.context.shaping.plain:
        raise Refused("a shape that is computed at run time would have to come from the device")
    vector = operand
    if operand.dtype is not ir.DataType.INT64:
        vector = op.compute(
            operand.shape, lambda v, i: v(*i).astype("int64"), operand, dtype=ir.DataType.INT64
        )
    builder = op.context.builder
    shape = builder.emit(relax.op.tensor_to_shape(op.context.expr(vector)))
    dims = [op.symbols.fresh("runtime") for _ in range(operand.shape[0])]
    builder.match_cast(shape, relax.ShapeType(dims))
    return list(dims)


def shape(op: Op) -> Operand:
    """``Shape`` with its ``start`` and ``end``."""
    x = op.input(0)
    start, end = op.attribute("start", 0), op.attribute("end")
    dims = list(x.shape)[slice(start, end)] if start >= -x.rank else list(x.shape)[:end]
    return op.context.from_content(contents.array(dims), ir.DataType.INT64)


def size(op: Op) -> Operand:
    """``Size``: the number of elements."""
    count = op.symbols.simplify(product(op.input(0).shape))
    return op.context.from_content(contents.array([count], ()), ir.DataType.INT64)


def reshape(op: Op) -> Operand:
    """``Reshape`` with 0 (keep) and -1 (infer)."""
    x, target = op.input(0), op.input(1)
    keep_zero = bool(op.attribute("allowzero", 0))
    if target.content is None:
        declared = op.declared()
        if declared is not None:
            return reshaped(op, x, declared)
        return reshaped(op, x, runtime_dims(op, _resolved(op, x, target, keep_zero)))
    dims: list[Dim] = []
    for position, item in enumerate(target.content.flat):
        zero = isinstance(item, int) and item == 0 and not keep_zero
        dims.append(x.shape[position] if zero else item)
    unknown = [i for i, d in enumerate(dims) if isinstance(d, int) and d == -1]
    if unknown:
        rest = [d for i, d in enumerate(dims) if i != unknown[0]]
        dims[unknown[0]] = op.symbols.divide_product(x.shape, rest)
    return reshaped(op, x, dims)


def _resolved(op: Op, x: Operand, target: Operand, keep_zero: bool) -> Operand:
    """A computed reshape target with 0 and -1 replaced by the extents that they stand for."""
    rank = target.shape[0]
    if not isinstance(rank, int):
        raise Refused("the rank of the result of Reshape is unknown")
    total = product(x.shape)

    def kernel(vector: Any) -> Any:
        def kept(i: int) -> Any:
            value = vector[i]
            if keep_zero or i >= x.rank:
                return value
            return tirx.Select(value == 0, _const(x.shape[i]), value)

        items = [kept(i) for i in range(rank)]
        known: Any = tirx.const(1, "int64")
        for item in items:
            known = known * tirx.Select(item < 0, tirx.const(1, "int64"), item)
        missing = tirx.floordiv(_const(total), tirx.max(known, tirx.const(1, "int64")))

        def element(index: Any) -> Any:
            result = missing
            for i, item in enumerate(items):
                picked = tirx.Select(item < 0, missing, item)
                result = tirx.Select(index == i, picked, result)
            return result

        return te.compute((rank,), element)

    return op.te(kernel, target)


def _const(dim: Dim) -> Any:
    return tirx.const(dim, "int64") if isinstance(dim, int) else dim


def flatten(op: Op) -> Operand:
    """``Flatten`` to two axes."""
    x = op.input(0)
    axis = op.axis(1, x.rank)
    return reshaped(op, x, [product(x.shape[:axis]), product(x.shape[axis:])])


def _axes(op: Op, index: int, rank: int) -> list[int] | None:
    axes = op.attribute("axes")
    if op.has(index):
        axes = op.needs(index, "axes").reshape(-1).tolist()
    return None if axes is None else [int(a) + rank if a < 0 else int(a) for a in axes]


def squeeze(op: Op) -> Operand:
    """``Squeeze``; without axes every static extent of 1 goes."""
    x = op.input(0)
    axes = _axes(op, 1, x.rank)
    if axes is None:
        if not all(isinstance(d, int) for d in x.shape):
            raise Refused("Squeeze without axes on a dynamic shape")
        axes = [i for i, d in enumerate(x.shape) if d == 1]
    return reshaped(op, x, [d for i, d in enumerate(x.shape) if i not in axes])


def unsqueeze(op: Op) -> Operand:
    """``Unsqueeze``."""
    x = op.input(0)
    if op.has(1) and op.constant(1) is None:
        declared = op.declared()
        if declared is None:
            raise Refused("axes must be known at compile time")
        return reshaped(op, x, declared)
    count = len(op.attribute("axes") or op.needs(1, "axes").reshape(-1))
    axes = _axes(op, 1, x.rank + count) or []
    dims = list(x.shape)
    for axis in sorted(axes):
        dims.insert(axis, 1)
    return reshaped(op, x, dims)


def transpose(op: Op) -> Operand:
    """``Transpose``."""
    x = op.input(0)
    return transposed(op, x, op.attribute("perm") or list(range(x.rank))[::-1])


def transposed(op: Op, x: Operand, order: Sequence[int]) -> Operand:
    """``x`` with its axes in another order."""
    if list(order) == list(range(x.rank)):
        return x
    if x.content is not None:
        return op.context.from_content(x.content.transpose(order), x.dtype)
    return op.context.emit(relax.op.permute_dims(op.context.expr(x), list(order)), x.dtype)


def concat(op: Op) -> Operand:
    """``Concat``."""
    operands = op.inputs()
    return concatenated(op, operands, op.axis(0, operands[0].rank))


def concatenated(op: Op, operands: Sequence[Operand], axis: int) -> Operand:
    """Operands one after the other along ``axis``."""
    first = operands[0]
    parts = [o.content for o in operands if o.content is not None]
    if len(parts) == len(operands):
        joined = np.concatenate(parts, axis=axis)
        if joined.size <= CONTENT_LIMIT:
            return op.context.from_content(joined, first.dtype)
    filled = [o for o in operands if not (isinstance(o.shape[axis], int) and o.shape[axis] == 0)]
    if len(filled) == 1:
        return filled[0]
    exprs = [op.context.expr(o) for o in filled or operands[:1]]
    return op.context.emit(relax.op.concat(exprs, axis), first.dtype)


def expand(op: Op) -> Operand:
    """``Expand``: broadcast to at least the given shape."""
    x, target = op.input(0), op.input(1)
    dims = list(target.content.flat) if target.content is not None else op.declared()
    if dims is None:
        dims = runtime_dims(op, target)
    return expanded(op, x, dims)


def expanded(op: Op, x: Operand, dims: Sequence[Dim]) -> Operand:
    """``x`` broadcast against ``dims``."""
    out = op.symbols.broadcast([x.shape, list(dims)])
    if len(out) == x.rank and all(
        op.symbols.equal(a, b) for a, b in zip(out, x.shape, strict=True)
    ):
        return x
    if (
        x.content is not None
        and all(isinstance(d, int) for d in out)
        and math.prod(out) <= CONTENT_LIMIT
    ):
        return op.context.from_content(np.broadcast_to(x.content, out), x.dtype)
    offset = len(out) - x.rank
    own = [
        out[offset + i] if op.symbols.equal(d, out[offset + i]) else d
        for i, d in enumerate(x.shape)
    ]
    return op.compute(out, lambda t, i: broadcast_index(t, i, own, out), x, dtype=x.dtype)


def tile(op: Op) -> Operand:
    """``Tile``."""
    x, repeats = op.input(0), op.content(1)
    if repeats is not None:
        dims = [op.symbols.simplify(d * r) for d, r in zip(x.shape, repeats.flat, strict=True)]
    else:
        declared = op.declared()
        if declared is None:
            counts = runtime_dims(op, op.input(1))
            dims = [op.symbols.simplify(d * r) for d, r in zip(x.shape, counts, strict=True)]
        else:
            dims = list(declared)
    if all(isinstance(d, int) for d in (*dims, *x.shape)):
        return _tiled(op, x, dims)
    return op.compute(
        dims,
        lambda t, i: t(*(tirx.floormod(k, _const(d)) for k, d in zip(i, x.shape, strict=True))),
        x,
        dtype=x.dtype,
    )


def _tiled(op: Op, x: Operand, dims: Sequence[Dim]) -> Operand:
    """Tiles of known extents, without a modulo: LLVM 22 vectorizes ``i & 3`` to wrong code."""
    apart: list[Dim] = []
    for whole, part in zip(dims, x.shape, strict=True):
        apart += [whole // part if part else 0, part]
    return reshaped(op, op.compute(apart, lambda t, i: t(*i[1::2]), x, dtype=x.dtype), dims)


def constant_of_shape(op: Op) -> Operand:
    """``ConstantOfShape``."""
    value = op.attribute("value")
    fill = value.numpy().reshape(()) if value is not None else np.zeros((), np.float32)
    dtype = value.dtype if value is not None else ir.DataType.FLOAT
    target = op.input(0)
    dims = list(target.content.flat) if target.content is not None else op.declared()
    if dims is None:
        dims = runtime_dims(op, target)
    scalar = op.context.embed(np.asarray(fill), dtype)
    return expanded(op, scalar, dims)


def range_(op: Op) -> Operand:
    """``Range``; its length must follow from constants, from dims or from the declared shape."""
    start, limit, delta = op.inputs()
    parts = [o.content for o in (start, limit, delta)]
    if all(p is not None for p in parts):
        first, last, step = (op.symbols.simplify(p.reshape(-1)[0]) for p in parts)  # type: ignore[union-attr]
        if isinstance(step, int):
            length = _range_length(op, first, last, step)
            if isinstance(length, int) and length <= CONTENT_LIMIT:
                items = [op.symbols.simplify(first + step * i) for i in range(length)]
                return op.context.from_content(contents.array(items), start.dtype)
            stored = start.stored
            return op.compute(
                [length], lambda i: (_const(first) + i[0] * step).astype(stored), dtype=start.dtype
            )
    numbers = [n for i in range(3) if (n := op.constant(i)) is not None]
    declared = op.declared()
    if len(numbers) == 3:
        start_, stop_, step_ = (n.reshape(()).item() for n in numbers)
        values = np.arange(start_, stop_, step_, dtype=numbers[0].dtype)
        return op.context.embed(values, start.dtype)
    if declared is None:
        raise Refused("the length of Range is computed at run time")
    return op.compute(
        declared,
        lambda a, d, i: a() + i[0].astype(start.stored) * d(),
        op.context.emit_scalar(start),
        op.context.emit_scalar(delta),
        dtype=start.dtype,
    )


def _range_length(op: Op, first: Dim, last: Dim, step: int) -> Dim:
    if step == 0:
        raise Refused("Range with a step of 0")
    distance = last - first if step > 0 else first - last
    length = floordiv(op.symbols.simplify(distance) + (abs(step) - 1), abs(step))
    return op.symbols.simplify(at_least(op.symbols.simplify(length), 0))


def eye_like(op: Op) -> Operand:
    """``EyeLike``: ones on the ``k``-th diagonal."""
    x = op.input(0)
    to = op.attribute("dtype")
    dtype = ir.DataType(to) if to else x.dtype
    diagonal = op.attribute("k", 0)
    from hal.targets.tvm.dtypes import STORED_AS

    stored = STORED_AS[dtype]
    one, zero = tirx.const(1, stored), tirx.const(0, stored)
    return op.compute(
        x.shape, lambda i: tirx.Select(i[1] - i[0] == diagonal, one, zero), dtype=dtype
    )


def depth_to_space(op: Op) -> Operand:
    """``DepthToSpace`` in both orders."""
    x, block = op.input(0), op.attribute("blocksize")
    n, c, h, w = x.shape
    deep = floordiv(c, block * block)
    if op.attribute("mode", "DCR") == "DCR":
        parts = reshaped(op, x, [n, block, block, deep, h, w])
        moved = transposed(op, parts, [0, 3, 4, 1, 5, 2])
    else:
        parts = reshaped(op, x, [n, deep, block, block, h, w])
        moved = transposed(op, parts, [0, 1, 4, 2, 5, 3])
    return reshaped(op, moved, [n, deep, h * block, w * block])


def space_to_depth(op: Op) -> Operand:
    """``SpaceToDepth`` in both orders."""
    x, block = op.input(0), op.attribute("blocksize")
    n, c, h, w = x.shape
    high, wide = floordiv(h, block), floordiv(w, block)
    parts = reshaped(op, x, [n, c, high, block, wide, block])
    order = [0, 3, 5, 1, 2, 4] if op.attribute("mode", "DCR") == "DCR" else [0, 1, 3, 5, 2, 4]
    return reshaped(op, transposed(op, parts, order), [n, c * block * block, high, wide])


def trilu(op: Op) -> Operand:
    """``Trilu``: keep the upper or lower triangle."""
    x = op.input(0)
    upper = bool(op.attribute("upper", 1))
    operands = [x]
    if op.has(1):
        operands.append(op.context.emit_scalar(op.input(1)))

    def body(tensor: Any, *rest: Any) -> Any:
        *scalars, indices = rest
        k = scalars[0]() if scalars else tirx.const(0, "int64")
        distance = indices[-1] - indices[-2]
        keep = distance >= k if upper else distance <= k
        return tirx.Select(keep, tensor(*indices), tirx.const(0, x.stored))

    return op.compute(x.shape, body, *operands, dtype=x.dtype)


def reverse_sequence(op: Op) -> Operand:
    """``ReverseSequence``."""
    x, lengths = op.input(0), op.input(1)
    batch, time = op.attribute("batch_axis", 1), op.attribute("time_axis", 0)

    def body(tensor: Any, length: Any, indices: Any) -> Any:
        picked = list(indices)
        count = length[indices[batch]].astype("int64")
        picked[time] = tirx.Select(indices[time] < count, count - 1 - indices[time], indices[time])
        return tensor(*picked)

    return op.compute(x.shape, body, x, lengths, dtype=x.dtype)


CONVERTERS: dict[str, Callable[[Op], Any]] = {
    "Shape": shape,
    "Size": size,
    "Reshape": reshape,
    "Flatten": flatten,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Transpose": transpose,
    "Concat": concat,
    "Expand": expand,
    "Tile": tile,
    "ConstantOfShape": constant_of_shape,
    "Range": range_,
    "EyeLike": eye_like,
    "DepthToSpace": depth_to_space,
    "SpaceToDepth": space_to_depth,
    "Trilu": trilu,
    "ReverseSequence": reverse_sequence,
}
"""Converters of this family by op type."""
