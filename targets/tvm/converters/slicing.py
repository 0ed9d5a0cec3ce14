"""Parts of tensors and tensors with borders: ``Slice``, ``Split``, ``Pad``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from hal.targets.tvm.dims import Dim, Refused, at_least, at_most, floordiv
from hal.targets.tvm.lowering import Op, Operand


def _const(dim: Dim) -> Any:
    return tirx.const(dim, "int64") if isinstance(dim, int) else dim


def split(op: Op) -> list[Operand]:
    """``Split`` by sizes or into equal parts."""
    x = op.input(0)
    axis = op.axis(0, x.rank)
    count = len(op.node.outputs)
    extent = x.shape[axis]
    sizes: list[Dim]
    if op.has(1) and op.content(1) is not None:
        sizes = list(op.input(1).content.flat)  # type: ignore[union-attr]
    elif op.has(1):
        declared = [op.declared(i) for i in range(count)]
        if any(d is None for d in declared):
            raise Refused("the sizes of Split must be known at compile time")
        sizes = [d[axis] for d in declared if d is not None]
    elif op.attribute("split") is not None:
        sizes = list(op.attribute("split"))
    else:
        part = floordiv(extent + (count - 1), count)
        sizes = [part] * (count - 1) + [op.symbols.simplify(extent - part * (count - 1))]
    results, start = [], 0
    for length in sizes:
        results.append(window(op, x, {axis: (start, 1, length)}))
        start = op.symbols.simplify(start + length)
    return results


def window(op: Op, x: Operand, cuts: dict[int, tuple[Any, int, Dim]]) -> Operand:
    """Elements ``start + step * i`` for ``i < length`` along each axis of ``cuts``."""
    if x.content is not None and all(
        isinstance(s, int) and isinstance(n, int) for s, _, n in cuts.values()
    ):
        content = x.content
        for axis, (start, step, length) in cuts.items():
            content = content.take([start + step * i for i in range(length)], axis=axis)
        return op.context.from_content(content, x.dtype)
    if all(
        isinstance(s, int) and s == 0 and step == 1 and op.symbols.equal(n, x.shape[axis])
        for axis, (s, step, n) in cuts.items()
    ):
        return x
    dims = [cuts[a][2] if a in cuts else d for a, d in enumerate(x.shape)]

    def body(tensor: Any, indices: Any) -> Any:
        return tensor(
            *(cuts[a][0] + cuts[a][1] * i if a in cuts else i for a, i in enumerate(indices))
        )

    return op.compute(dims, body, x, dtype=x.dtype)


def slice_(op: Op) -> Operand:
    """``Slice``: constant, symbolic, or computed where the result's shape is declared."""
    x = op.input(0)
    if not op.has(1):
        raise Refused("Slice with attributes needs an older operator set")
    starts, ends = op.input(1), op.input(2)
    count = starts.shape[0]
    if not isinstance(count, int):
        raise Refused("Slice along an unknown number of axes")
    dynamic = any(op.has(i) and op.constant(i) is None for i in (3, 4))
    if dynamic or starts.content is None or ends.content is None:
        return _runtime_slice(op, x)
    axes = list(range(count))
    if op.has(3):
        axes = [int(a) + x.rank if a < 0 else int(a) for a in op.needs(3, "axes")]
    steps = op.needs(4, "steps").tolist() if op.has(4) else [1] * count
    cuts = {}
    for axis, start, end, step in zip(
        axes, starts.content.flat, ends.content.flat, steps, strict=True
    ):
        cuts[axis] = _cut(op, x.shape[axis], start, end, int(step))
    return window(op, x, cuts)


def _cut(op: Op, extent: Dim, start: Dim, end: Dim, step: int) -> tuple[Dim, int, Dim]:
    """Start, step and length of a slice of an axis, as NumPy clamps them."""
    low, high = (0, extent) if step > 0 else (-1, op.symbols.simplify(extent - 1))
    first = _clamped(op, extent, start, 0, high)
    last = _clamped(op, extent, end, low, high)
    if step > 0:
        length = floordiv(last - first + (step - 1), step)
    else:
        length = floordiv(first - last + (-step - 1), -step)
    return first, step, op.symbols.simplify(at_least(op.symbols.simplify(length), 0))


def _clamped(op: Op, extent: Dim, value: Dim, low: Dim, high: Dim) -> Dim:
    if isinstance(value, int):
        if value < -(2**31):
            return low
        if value >= 2**31 - 1:
            return high
        position = op.symbols.simplify(extent + value) if value < 0 else value
    else:
        negative = op.symbols.decide(value < 0)
        if negative is None:
            position = tirx.Select(value < 0, value + extent, value)
        else:
            position = value + extent if negative else value
    return op.symbols.simplify(at_least(at_most(op.symbols.simplify(position), high), low))


def _runtime_slice(op: Op, x: Operand) -> Operand:
    """A slice whose starts are read from a tensor; the shape of the result must be declared."""
    declared = op.declared()
    if declared is None:
        raise Refused("a slice whose bounds are computed needs a declared result shape")
    count = int(op.input(1).shape[0])
    given = [op.input(1)] + [op.input(i) for i in (3, 4) if op.has(i)]

    def body(tensor: Any, start: Any, *rest: Any) -> Any:
        *others, indices = rest
        axes = others.pop(0) if op.has(3) else None
        steps = others.pop(0) if op.has(4) else None
        picked = []
        for axis, index in enumerate(indices):
            extent, place = _const(x.shape[axis]), index
            for position in range(count):
                step = (
                    steps[position].astype("int64") if steps is not None else tirx.const(1, "int64")
                )
                first = start[position].astype("int64")
                first = tirx.Select(first < 0, first + extent, first)
                high = tirx.Select(step > 0, extent, extent - 1)
                first = tirx.max(tirx.min(first, high), tirx.const(0, "int64"))
                if axes is None:
                    place = first + index * step if position == axis else place
                else:
                    named = axes[position].astype("int64")
                    hit = tirx.Or(named == axis, named + x.rank == axis)
                    place = tirx.Select(hit, first + index * step, place)
            picked.append(place)
        return tensor(*picked)

    return op.compute(declared, body, x, *given, dtype=x.dtype)


def pad(op: Op) -> Operand:
    """``Pad`` in all modes."""
    x = op.input(0)
    mode = op.attribute("mode", "constant")
    if op.has(1) and op.content(1) is None:
        return _runtime_pad(op, x, mode)
    amounts = _pad_amounts(op, x)
    before = [amounts[a][0] for a in range(x.rank)]
    dims = [op.symbols.simplify(d + sum(amounts[a])) for a, d in enumerate(x.shape)]
    fill = op.optional(2)
    operands = [x] + (
        [op.context.emit_scalar(fill)] if fill is not None and mode == "constant" else []
    )

    def body(tensor: Any, *rest: Any) -> Any:
        *scalars, indices = rest
        positions = [i - b for i, b in zip(indices, before, strict=True)]
        if mode == "constant":
            value = scalars[0]() if scalars else tirx.const(0, x.stored)
            inside = [
                tirx.And(p >= 0, p < _const(d))
                for p, d, a in zip(positions, x.shape, range(x.rank), strict=True)
                if any(not isinstance(v, int) or v != 0 for v in amounts[a])
            ]
            if not inside:
                return tensor(*positions)
            return tirx.if_then_else(tirx.all(*inside), tensor(*positions), value)
        return tensor(
            *(_mirrored(mode, p, _const(d)) for p, d in zip(positions, x.shape, strict=True))
        )

    return op.compute(dims, body, *operands, dtype=x.dtype)


def _runtime_pad(op: Op, x: Operand, mode: str) -> Operand:
    """``Pad`` by computed amounts; the shape of the result must be declared."""
    declared, amounts, fill = op.declared(), op.input(1), op.optional(2)
    if declared is None:
        raise Refused("the amounts of Pad are computed and the result's shape is unknown")
    operands = [x, amounts] + ([op.input(3)] if op.has(3) else [])
    if fill is not None:
        operands.append(op.context.emit_scalar(fill))
    count = int(amounts.shape[0]) // 2

    def body(tensor: Any, amount: Any, *rest: Any) -> Any:
        *others, indices = rest
        axes = others.pop(0) if op.has(3) else None
        places, inside = [], []
        for axis, index in enumerate(indices):
            before: Any = tirx.const(0, "int64")
            for position in range(count):
                if axes is None:
                    before = amount[position] if position == axis else before
                else:
                    named = axes[position].astype("int64")
                    hit = tirx.Or(named == axis, named + x.rank == axis)
                    before = tirx.Select(hit, amount[position], before)
            place, extent = index - before, _const(x.shape[axis])
            if mode != "constant":
                place = _mirrored(mode, place, extent)
            inside += [place >= 0, place < extent]
            places.append(place)
        if mode != "constant":
            return tensor(*places)
        value = others[0]() if others else tirx.const(0, x.stored)
        return tirx.if_then_else(tirx.all(*inside), tensor(*places), value)

    return op.compute(declared, body, *operands, dtype=x.dtype)


def _pad_amounts(op: Op, x: Operand) -> list[tuple[Dim, Dim]]:
    if op.has(1):
        content = op.content(1)
        if content is None:
            raise Refused("the amounts of Pad must be known at compile time")
        flat = list(content.flat)
    else:
        flat = list(op.attribute("pads"))
    axes = list(range(x.rank))
    if op.has(3):
        axes = [int(a) + x.rank if a < 0 else int(a) for a in op.needs(3, "axes")]
    amounts: list[tuple[Dim, Dim]] = [(0, 0)] * x.rank
    for position, axis in enumerate(axes):
        amounts[axis] = (flat[position], flat[position + len(axes)])
    return amounts


def _mirrored(mode: str, position: Any, extent: Any) -> Any:
    if mode == "edge":
        return tirx.max(tirx.min(position, extent - 1), tirx.const(0, "int64"))
    if mode == "wrap":
        return tirx.floormod(position, extent)
    if mode == "reflect":
        period = tirx.max(extent * 2 - 2, tirx.const(1, "int64"))
        inside = tirx.floormod(position, period)
        return tirx.Select(inside < extent, inside, period - inside)
    raise Refused(f"Pad mode {mode!r}")


CONVERTERS: dict[str, Callable[[Op], Any]] = {"Split": split, "Slice": slice_, "Pad": pad}
"""Converters of this family by op type."""
