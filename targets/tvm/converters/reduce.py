"""Reductions, running sums, arg-reductions and softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
from tvm import te, tirx

from hal.targets.tvm.converters.elementwise import dtype_of, elementwise, is_nan, maximum, minimum
from hal.targets.tvm.converters.shape import reshaped
from hal.targets.tvm.dims import Refused, product
from hal.targets.tvm.dtypes import FLOATS, NUMBERS
from hal.targets.tvm.lowering import Op, Operand

Combine = Callable[[Any, Any], Any]


def fold(
    op: Op,
    x: Operand,
    axes: Sequence[int],
    combine: Combine,
    start: Callable[[str], Any],
    *,
    prepare: Callable[[Any], Any] = lambda v: v,
    keep: bool = True,
    accumulate: str | None = None,
) -> Operand:
    """Reduce ``x`` over ``axes``; the result has dtype ``accumulate`` (of ``x`` by default)."""
    stored = accumulate or x.stored
    if any(isinstance(x.shape[a], int) and x.shape[a] == 0 for a in axes):
        # A loop that never runs would leave the result unset.
        dims = [1 if a in axes else d for a, d in enumerate(x.shape) if keep or a not in axes]
        return op.compute(dims, lambda i: start(stored))
    reducer = te.comm_reducer(combine, start, name="fold")
    kept = [a for a in range(x.rank) if a not in axes]

    def kernel(tensor: Any) -> Any:
        ranges = {a: te.reduce_axis((0, tensor.shape[a]), name=f"r{a}") for a in axes}

        def element(*indices: Any) -> Any:
            places = indices if keep else dict(zip(kept, indices, strict=True))
            picked = [ranges[a] if a in ranges else places[a] for a in range(x.rank)]
            return reducer(prepare(tensor(*picked).astype(stored)), axis=list(ranges.values()))

        shape = [
            tirx.const(1, "int64") if a in ranges else tensor.shape[a]
            for a in range(x.rank)
            if keep or a not in ranges
        ]
        return te.compute(shape, element, name="fold")

    return op.te(kernel, x)


def _axes(op: Op, rank: int) -> list[int] | None:
    """Axes to reduce over, or None when the op is to do nothing."""
    axes = op.attribute("axes")
    if op.has(1):
        array = op.constant(1)
        if array is None:
            return _axes_from_shapes(op, rank)
        axes = array.reshape(-1).tolist()
    if not axes:
        return None if op.attribute("noop_with_empty_axes", 0) else list(range(rank))
    return sorted({int(a) + rank if a < 0 else int(a) for a in axes})


def _axes_from_shapes(op: Op, rank: int) -> list[int]:
    """Axes that are computed at run time but follow from the declared shapes."""
    declared, x = op.declared(), op.input(0)
    empty = op.input(1).shape == (0,)
    if empty:
        return [] if op.attribute("noop_with_empty_axes", 0) else list(range(rank))
    if declared is not None and op.attribute("keepdims", 1) and len(declared) == rank:
        axes = [a for a in range(rank) if declared[a] == 1 and x.shape[a] != 1]
        ambiguous = any(declared[a] == 1 and x.shape[a] == 1 for a in range(rank))
        if not ambiguous:
            return axes
        return [a for a in range(rank) if declared[a] == 1]
    if declared is not None and all(isinstance(d, int) for d in x.shape):
        choices = _removals(list(x.shape), list(declared))
        if len(choices) == 1:
            return choices[0]
    raise Refused("axes must be known at compile time")


def _removals(shape: list[int], result: list[int]) -> list[list[int]]:
    """All sets of axes whose removal from ``shape`` leaves ``result``."""
    import itertools

    count = len(shape) - len(result)
    return [
        list(axes)
        for axes in itertools.combinations(range(len(shape)), count)
        if [d for a, d in enumerate(shape) if a not in axes] == result
    ]


def _zero(dtype: str) -> Any:
    return tirx.const(0, dtype)


def _one(dtype: str) -> Any:
    return tirx.const(1, dtype)


def _lowest(dtype: str) -> Any:
    if "float" in dtype:
        return tirx.const(float("-inf"), dtype)
    return tirx.const(0, dtype) if dtype == "bool" else tirx.min_value(dtype)


def _highest(dtype: str) -> Any:
    if "float" in dtype:
        return tirx.const(float("inf"), dtype)
    return tirx.const(1, dtype) if dtype == "bool" else tirx.max_value(dtype)


def add(a: Any, b: Any) -> Any:
    """Sum of two scalars."""
    return a + b


def _wide(x: Operand) -> str:
    return "float32" if x.stored in ("float16", "bfloat16") else x.stored


def total(
    op: Op, x: Operand, axes: Sequence[int], *, keep: bool = True, prepare: Any = lambda v: v
) -> Operand:
    """Sum over ``axes``; half precision is summed in float32 and stays float32."""
    return fold(op, x, axes, add, _zero, prepare=prepare, keep=keep, accumulate=_wide(x))


def _finish(
    op: Op, x: Operand, result: Operand, after: Callable[[Any], Any] | None = None
) -> Operand:
    """Apply ``after`` and return to the dtype of ``x``."""
    if after is None and result.stored == x.stored:
        return Operand(x.dtype, result.shape, result.expr)

    def body(v: Any) -> Any:
        v = after(v) if after else v
        return v.astype(x.stored)

    return elementwise(op, body, [result], x.dtype)


def _reduction(
    combine: Combine,
    start: Callable[[str], Any],
    prepare: Callable[[Any], Any] = lambda v: v,
    after: Callable[[Any], Any] | None = None,
    allowed: frozenset[ir.DataType] = NUMBERS,
) -> Callable[[Op], Operand]:
    def convert(op: Op) -> Operand:
        x = op.require(0, allowed)
        axes = _axes(op, x.rank)
        if axes is None:
            axes = []
        keep = bool(op.attribute("keepdims", 1))
        if not axes:
            result = elementwise(op, lambda v: prepare(v.astype(_wide(x))), [x])
        else:
            result = fold(
                op, x, axes, combine, start, prepare=prepare, keep=keep, accumulate=_wide(x)
            )
        return _finish(op, x, result, after)

    return convert


def reduce_mean(op: Op) -> Operand:
    """``ReduceMean``."""
    x = op.require(0, NUMBERS)
    axes = _axes(op, x.rank)
    if not axes:
        return x
    summed = total(op, x, axes, keep=bool(op.attribute("keepdims", 1)))
    count = product(x.shape[a] for a in axes)
    return scaled_mean(op, x, summed, count)


def scaled_mean(op: Op, x: Operand, summed: Operand, count: Any) -> Operand:
    """``summed / count`` in the dtype of ``x``; ``count`` is a dim."""

    def body(v: Any) -> Any:
        number = (
            tirx.const(count, dtype_of(v)) if isinstance(count, int) else count.astype(dtype_of(v))
        )
        quotient = v / number if "float" in dtype_of(v) else tirx.truncdiv(v, number)
        return quotient.astype(x.stored)

    return elementwise(op, body, [summed], x.dtype)


def reduce_log_sum_exp(op: Op) -> Operand:
    """``ReduceLogSumExp`` with the maximum taken out first."""
    x = op.require(0, FLOATS)
    axes = _axes(op, x.rank)
    if not axes:
        return x
    peak = fold(op, x, axes, maximum, _lowest, accumulate=_wide(x))
    safe = elementwise(
        op, lambda m: tirx.Select(tirx.isinf(m), tirx.const(0, dtype_of(m)), m), [peak]
    )
    shifted = elementwise(op, lambda v, m: tirx.exp(v.astype(_wide(x)) - m), [x, safe])
    summed = total(op, shifted, axes)
    result = elementwise(
        op, lambda s, m: (tirx.log(s) + m).astype(x.stored), [summed, safe], x.dtype
    )
    if op.attribute("keepdims", 1):
        return result
    return reshaped(op, result, [d for a, d in enumerate(result.shape) if a not in axes])


def softmax_over(op: Op, x: Operand, axis: int, *, log: bool = False) -> Operand:
    """Softmax (or its logarithm) along ``axis``, computed in float32 at least."""
    wide = _wide(x)

    def kernel(tensor: Any) -> Any:
        extent = tensor.shape[axis]
        rest = [d for a, d in enumerate(tensor.shape) if a != axis]

        def at(indices: Sequence[Any], k: Any) -> list[Any]:
            picked = list(indices)
            picked.insert(axis, k)
            return picked

        k1, k2 = te.reduce_axis((0, extent), name="k1"), te.reduce_axis((0, extent), name="k2")
        peak = te.compute(
            rest, lambda *i: te.max(tensor(*at(i, k1)).astype(wide), axis=k1), name="peak"
        )
        exps = te.compute(
            tensor.shape,
            lambda *i: tirx.exp(tensor(*i).astype(wide) - peak(*i[:axis], *i[axis + 1 :])),
            name="exps",
        )
        sums = te.compute(rest, lambda *i: te.sum(exps(*at(i, k2)), axis=k2), name="sums")
        if log:
            return te.compute(
                tensor.shape,
                lambda *i: (
                    tensor(*i).astype(wide)
                    - peak(*i[:axis], *i[axis + 1 :])
                    - tirx.log(sums(*i[:axis], *i[axis + 1 :]))
                ).astype(x.stored),
                name="log_softmax",
            )
        return te.compute(
            tensor.shape,
            lambda *i: (exps(*i) / sums(*i[:axis], *i[axis + 1 :])).astype(x.stored),
            name="softmax",
        )

    return op.te(kernel, x, dtype=x.dtype)


def softmax(op: Op) -> Operand:
    """``Softmax``."""
    x = op.require(0, FLOATS)
    return softmax_over(op, x, op.axis(-1, x.rank))


def log_softmax(op: Op) -> Operand:
    """``LogSoftmax``."""
    x = op.require(0, FLOATS)
    return softmax_over(op, x, op.axis(-1, x.rank), log=True)


def extreme_index(op: Op, x: Operand, axis: int, better: Combine, last: bool) -> Operand:
    """Index (int64, extent 1 along ``axis``) of the best element; ties go to the first or last."""

    def combine(a: Any, b: Any) -> Any:
        wins = better(b[1], a[1])
        tie = b[1] == a[1]
        later = b[0] > a[0] if last else b[0] < a[0]
        unset = a[0] < 0
        take = tirx.Or(unset, tirx.And(b[0] >= 0, tirx.Or(wins, tirx.And(tie, later))))
        return tirx.Select(take, b[0], a[0]), tirx.Select(take, b[1], a[1])

    reducer = te.comm_reducer(
        combine, lambda i, v: (tirx.const(-1, i), tirx.const(0, v)), name="extreme"
    )

    def kernel(tensor: Any) -> Any:
        k = te.reduce_axis((0, tensor.shape[axis]), name="k")
        shape = [tirx.const(1, "int64") if a == axis else d for a, d in enumerate(tensor.shape)]

        def element(*indices: Any) -> Any:
            picked = [k if a == axis else i for a, i in enumerate(indices)]
            return reducer((k.var.astype("int64"), tensor(*picked)), axis=k)

        found, _ = te.compute(shape, element, name="extreme")
        return te.compute(shape, lambda *i: found(*i), name="index")

    return op.te(kernel, x, dtype=ir.DataType.INT64)


def _arg(better: Combine) -> Callable[[Op], Operand]:
    def convert(op: Op) -> Operand:
        x = op.require(0, NUMBERS)
        axis = op.axis(0, x.rank)
        last = bool(op.attribute("select_last_index", 0))
        result = extreme_index(op, x, axis, better, last)
        if op.attribute("keepdims", 1):
            return result
        return reshaped(op, result, [d for a, d in enumerate(result.shape) if a != axis])

    return convert


def hardmax(op: Op) -> Operand:
    """``Hardmax``: 1 at the first maximum along an axis."""
    x = op.require(0, FLOATS)
    axis = op.axis(-1, x.rank)
    best = extreme_index(op, x, axis, lambda a, b: a > b, False)

    def body(index: Any, indices: Any) -> Any:
        at = [tirx.const(0, "int64") if a == axis else i for a, i in enumerate(indices)]
        hit = index(*at) == indices[axis]
        return tirx.Select(hit, tirx.const(1, x.stored), tirx.const(0, x.stored))

    return op.compute(x.shape, body, best, dtype=x.dtype)


def _cumulative(combine: Combine, start: Callable[[str], Any]) -> Callable[[Op], Operand]:
    def convert(op: Op) -> Operand:
        x = op.require(0, NUMBERS)
        where = op.constant(1)
        exclusive, reverse = bool(op.attribute("exclusive", 0)), bool(op.attribute("reverse", 0))
        if where is None:
            # The axis is computed: one result for each, then the choice.
            chosen = op.context.emit_scalar(op.input(1))
            results = [
                _running(op, x, a, combine, start, exclusive, reverse) for a in range(x.rank)
            ]

            def choose(which: Any, *candidates: Any) -> Any:
                result = candidates[0]
                for a, candidate in enumerate(candidates[1:], 1):
                    hit = tirx.Or(which == a, which + x.rank == a)
                    result = tirx.Select(hit, candidate, result)
                return result

            return elementwise(op, choose, [chosen, *results], x.dtype)
        axis = int(where.reshape(()))
        return _running(op, x, axis % x.rank, combine, start, exclusive, reverse)

    return convert


def _running(
    op: Op,
    x: Operand,
    axis: int,
    combine: Combine,
    start: Callable[[str], Any],
    exclusive: bool,
    reverse: bool,
) -> Operand:
    """Running ``combine`` along ``axis``."""
    reducer = te.comm_reducer(combine, start, name="running")

    def kernel(tensor: Any) -> Any:
        k = te.reduce_axis((0, tensor.shape[axis]), name="k")

        def element(*indices: Any) -> Any:
            here = indices[axis]
            if reverse:
                inside = k > here if exclusive else k >= here
            else:
                inside = k < here if exclusive else k <= here
            picked = [k if a == axis else i for a, i in enumerate(indices)]
            return reducer(tirx.Select(inside, tensor(*picked), start(x.stored)), axis=k)

        return te.compute(tensor.shape, element, name="running")

    return op.te(kernel, x, dtype=x.dtype)


def _magnitude(v: Any) -> Any:
    if dtype_of(v).startswith("uint"):
        return v
    return (
        tirx.abs(v)
        if "float" in dtype_of(v)
        else tirx.Select(v < 0, tirx.const(0, dtype_of(v)) - v, v)
    )


def _boolean_extreme(
    name: str, pick: Combine, start: Callable[[str], Any]
) -> Callable[[Op], Operand]:
    numeric = _reduction(pick, start)

    def convert(op: Op) -> Operand:
        x = op.input(0)
        if x.dtype is not ir.DataType.BOOL:
            return numeric(op)
        axes = _axes(op, x.rank)
        if not axes:
            return x
        plain = tirx.max if name == "max" else tirx.min
        result = fold(
            op, x, axes, plain, start, keep=bool(op.attribute("keepdims", 1)), accumulate="uint8"
        )
        return elementwise(op, lambda v: v != tirx.const(0, "uint8"), [result], x.dtype)

    return convert


def _root(v: Any) -> Any:
    if "float" in dtype_of(v):
        return tirx.sqrt(v)
    return tirx.sqrt(v.astype("float64")).astype(dtype_of(v))


def _logarithm(v: Any) -> Any:
    if "float" in dtype_of(v):
        return tirx.log(v)
    return tirx.log(v.astype("float64")).astype(dtype_of(v))


CONVERTERS: dict[str, Callable[[Op], Any]] = {
    "ReduceSum": _reduction(add, _zero),
    "ReduceProd": _reduction(lambda a, b: a * b, _one),
    "ReduceMax": _boolean_extreme("max", maximum, _lowest),
    "ReduceMin": _boolean_extreme("min", minimum, _highest),
    "ReduceMean": reduce_mean,
    "ReduceL1": _reduction(add, _zero, _magnitude),
    "ReduceL2": _reduction(add, _zero, lambda v: v * v, _root),
    "ReduceSumSquare": _reduction(add, _zero, lambda v: v * v),
    "ReduceLogSum": _reduction(add, _zero, after=_logarithm),
    "ReduceLogSumExp": reduce_log_sum_exp,
    "Softmax": softmax,
    "LogSoftmax": log_softmax,
    "Hardmax": hardmax,
    "ArgMax": _arg(lambda a, b: a > b),
    "ArgMin": _arg(lambda a, b: a < b),
    "CumSum": _cumulative(add, _zero),
    "CumProd": _cumulative(lambda a, b: a * b, _one),
}
"""Converters of this family by op type."""

__all__ = ["CONVERTERS", "fold", "is_nan", "scaled_mean", "softmax_over", "total"]
