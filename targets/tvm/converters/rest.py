"""Smaller families: dropout, resize, grid sampling, windows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import tirx

from hal.targets.tvm.converters.shape import expanded
from hal.targets.tvm.dims import Refused
from hal.targets.tvm.dtypes import FLOATS, NUMBERS
from hal.targets.tvm.lowering import Op, Operand


def dropout(op: Op) -> list[Operand | None]:
    """``Dropout`` when it does nothing: in inference, or with a ratio of 0."""
    x = op.input(0)
    training = op.constant(2)
    if (op.has(2) and training is None) or (training is not None and bool(training)):
        ratio = op.constant(1)
        if ratio is None or float(ratio) != 0.0:
            raise Refused("Dropout in training mode draws random numbers")
    mask = None
    if op.wants(1):
        mask = expanded(op, op.context.embed(np.array(True)), x.shape)
    return [x, mask]


# -- resize -----------------------------------------------------------------------------------


def resize(op: Op) -> Operand:
    """``Resize``: nearest, linear and cubic, of static shapes with known sizes or scales."""
    x = op.require(0, NUMBERS)
    if not all(isinstance(d, int) for d in x.shape):
        raise Refused("Resize of a dynamic shape")
    axes = [a % x.rank for a in op.attribute("axes") or range(x.rank)]
    extents, scales = _sizes(op, x, axes)
    mode = op.attribute("mode", "nearest")
    if op.attribute("antialias", 0):
        raise Refused("Resize with antialias is not implemented")
    roi = op.constant(1) if op.has(1) else None
    transformation = op.attribute("coordinate_transformation_mode", "half_pixel")
    if transformation == "tf_crop_and_resize" and roi is None:
        raise Refused("the region of Resize must be known at compile time")
    tables: list[_Taps | None] = []
    for axis in range(x.rank):
        if (
            extents[axis] == x.shape[axis]
            and scales[axis] == 1.0
            and transformation != "tf_crop_and_resize"
        ):
            tables.append(None)
            continue
        place = axes.index(axis) if axis in axes else None
        window = None
        if roi is not None and roi.size and place is not None:
            window = (float(roi[place]), float(roi[place + len(axes)]))
        points = _coordinates(transformation, x.shape[axis], extents[axis], scales[axis], window)
        tables.append(_taps(op, mode, points, x.shape[axis], scales[axis]))
    if transformation == "tf_crop_and_resize":
        return _interpolate(op, x, extents, tables, float(op.attribute("extrapolation_value", 0.0)))
    return _interpolate(op, x, extents, tables, None)


def _sizes(op: Op, x: Operand, axes: Sequence[int]) -> tuple[list[int], list[float]]:
    """Result extents and scales of all axes."""
    extents, factors = list(x.shape), [1.0] * x.rank
    given = op.constant(2) if op.has(2) else None
    sizes = op.constant(3) if op.has(3) else None
    declared = op.declared()
    if given is not None and given.size:
        for axis, scale in zip(axes, given.reshape(-1), strict=True):
            factors[axis] = float(scale)
            extents[axis] = math.floor(x.shape[axis] * float(scale))
        return extents, factors
    if sizes is None and declared is not None and op.has(3):
        sizes = np.array([declared[a] for a in axes])
        if op.attribute("keep_aspect_ratio_policy", "stretch") != "stretch":
            raise Refused("the sizes of Resize must be known at compile time")
    if sizes is None or not sizes.size:
        raise Refused("the sizes or scales of Resize must be known at compile time")
    wanted = [int(s) for s in sizes.reshape(-1)]
    policy = op.attribute("keep_aspect_ratio_policy", "stretch")
    if policy != "stretch":
        pick = min if policy == "not_larger" else max
        scale = pick(w / x.shape[a] for w, a in zip(wanted, axes, strict=True))
        for axis in axes:
            factors[axis] = scale
            extents[axis] = math.floor(scale * x.shape[axis] + 0.5)
        return extents, factors
    for axis, size in zip(axes, wanted, strict=True):
        extents[axis], factors[axis] = size, size / x.shape[axis]
    return extents, factors


def _coordinates(
    mode: str, source: int, target: int, scale: float, window: tuple[float, float] | None
) -> np.ndarray:
    """Where in the input each result position lies."""
    i = np.arange(target, dtype=np.float64)
    if mode == "half_pixel":
        return (i + 0.5) / scale - 0.5
    if mode == "half_pixel_symmetric":
        adjustment = target / (scale * source)
        return source / 2 * (1 - adjustment) + (i + 0.5) / scale - 0.5
    if mode == "pytorch_half_pixel":
        return (i + 0.5) / scale - 0.5 if target > 1 else np.zeros(target)
    if mode == "align_corners":
        wide = scale * source
        return i * (source - 1) / (wide - 1) if wide > 1 else np.zeros(target)
    if mode == "asymmetric":
        return i / scale
    if mode == "tf_crop_and_resize":
        start, end = window if window is not None else (0.0, 1.0)
        if target > 1:
            return start * (source - 1) + i * (end - start) * (source - 1) / (target - 1)
        return np.full(target, 0.5 * (start + end) * (source - 1))
    raise Refused(f"Resize with coordinates {mode!r}")


_Taps = tuple[np.ndarray, np.ndarray, np.ndarray]


def _taps(op: Op, mode: str, points: np.ndarray, source: int, scale: float) -> _Taps:
    """Input positions and weights ``[target, taps]`` along an axis; which points are outside."""
    outside = (points < 0) | (points > source - 1)
    if mode == "nearest":
        rounding = op.attribute("nearest_mode", "round_prefer_floor")
        roundings: dict[str, Callable[[np.ndarray], np.ndarray]] = {
            "round_prefer_floor": lambda p: np.ceil(p - 0.5),
            "round_prefer_ceil": lambda p: np.floor(p + 0.5),
            "floor": np.floor,
            "ceil": np.ceil,
        }
        whole = roundings[rounding](points)
        index = np.clip(whole, 0, source - 1).astype(np.int64)[:, None]
        return index, np.ones(index.shape), outside
    if mode == "linear":
        base = np.floor(points)
        ratio = points - base
        index = np.stack([base, base + 1], 1)
        weights = np.stack([1 - ratio, ratio], 1)
    elif mode == "cubic":
        base = np.floor(points)
        ratio = points - base
        index = np.stack([base + k for k in (-1, 0, 1, 2)], 1)
        weights = _cubic(ratio, float(op.attribute("cubic_coeff_a", -0.75)))
    else:
        raise Refused(f"Resize mode {mode!r}")
    if mode == "cubic" and op.attribute("exclude_outside", 0):
        weights = np.where((index < 0) | (index >= source), 0.0, weights)
        weights = weights / weights.sum(1, keepdims=True)
    return np.clip(index, 0, source - 1).astype(np.int64), weights, outside


def _cubic(ratio: np.ndarray, a: float) -> np.ndarray:
    """Weights of the four neighbours of a point."""
    r = ratio
    return np.stack(
        [
            ((a * (r + 1) - 5 * a) * (r + 1) + 8 * a) * (r + 1) - 4 * a,
            ((a + 2) * r - (a + 3)) * r * r + 1,
            ((a + 2) * (1 - r) - (a + 3)) * (1 - r) * (1 - r) + 1,
            ((a * (2 - r) - 5 * a) * (2 - r) + 8 * a) * (2 - r) - 4 * a,
        ],
        1,
    )


def _interpolate(
    op: Op, x: Operand, extents: Sequence[int], tables: Sequence[_Taps | None], fill: float | None
) -> Operand:
    """One axis after the other: a weighted sum of a few inputs."""
    result = x
    for axis, table in enumerate(tables):
        if table is not None:
            result = _interpolate_axis(op, result, axis, table, fill)
    if any(result.shape[a] != e for a, e in enumerate(extents)):
        raise Refused("Resize to sizes that do not follow from its scales")
    return result


def _interpolate_axis(op: Op, x: Operand, axis: int, table: _Taps, fill: float | None) -> Operand:
    index, weights, outside = table
    taps = index.shape[1]
    places = op.context.embed(index)
    if places.content is not None:
        places = Operand(places.dtype, places.shape, op.context.expr(places))
    factors = op.context.embed(weights.astype(np.float32))
    flags = op.context.embed(outside.astype(np.uint8))
    dims = [index.shape[0] if a == axis else d for a, d in enumerate(x.shape)]
    exact = taps == 1

    def body(tensor: Any, where: Any, factor: Any, out: Any, i: Any) -> Any:
        def at(t: int) -> Any:
            return tensor(*(where[k, t] if a == axis else k for a, k in enumerate(i)))

        if exact:
            value = at(0)
        else:
            value = at(0).astype("float32") * factor[i[axis], 0]
            for t in range(1, taps):
                value = value + at(t).astype("float32") * factor[i[axis], t]
            value = value.astype(x.stored)
        if fill is None:
            return value
        return tirx.Select(
            out[i[axis]] != tirx.const(0, "uint8"), tirx.const(fill, x.stored), value
        )

    if x.dtype not in FLOATS and not exact:
        raise Refused("Resize of integers by interpolation")
    return op.compute(dims, body, x, places, factors, flags, dtype=x.dtype)


# -- grid sampling ----------------------------------------------------------------------------


def grid_sample(op: Op) -> Operand:
    """``GridSample`` of images and volumes: nearest, linear, cubic with each padding mode."""
    x, grid = op.require(0, FLOATS), op.input(1)
    mode = {"bilinear": "linear", "bicubic": "cubic"}.get(
        op.attribute("mode", "linear"), op.attribute("mode", "linear")
    )
    padding, corners = op.attribute("padding_mode", "zeros"), bool(op.attribute("align_corners", 0))
    spatial = x.shape[2:]
    if not all(isinstance(d, int) for d in spatial):
        raise Refused("GridSample of a dynamic shape")
    if mode == "cubic" and len(spatial) != 2:
        raise Refused("cubic GridSample of volumes")
    rank = len(spatial)
    dims = [*x.shape[:2], *grid.shape[1:-1]]

    def body(image: Any, places: Any, i: Any) -> Any:
        n, c, *at = i
        points = []
        for a in range(rank):
            position = places(n, *at, rank - 1 - a).astype("float32")
            points.append(_unnormalized(position, spatial[a], corners))
        if padding != "zeros" and mode != "cubic":
            points = [_folded(p, s, padding, corners) for p, s in zip(points, spatial, strict=True)]
        total: Any = tirx.const(0, "float32")
        for taps in itertools.product(*(_grid_taps(mode, p) for p in points)):
            weight: Any = tirx.const(1, "float32")
            index, inside = [], []
            for (place, factor), extent in zip(taps, spatial, strict=True):
                weight = weight * factor
                if padding != "zeros" and mode == "cubic":
                    place = _folded(place, extent, padding, corners)
                whole = place.astype("int64")
                inside += [whole >= 0, whole < extent]
                index.append(
                    tirx.max(
                        tirx.min(whole, tirx.const(extent - 1, "int64")), tirx.const(0, "int64")
                    )
                )
            value = image(n, c, *index).astype("float32") * weight
            total = total + tirx.Select(tirx.all(*inside), value, tirx.const(0, "float32"))
        return total.astype(x.stored)

    return op.compute(dims, body, x, grid, dtype=x.dtype)


def _f(value: float) -> Any:
    return tirx.const(value, "float32")


def _unnormalized(position: Any, extent: int, corners: bool) -> Any:
    """A coordinate of -1 … 1 in pixels."""
    if corners:
        return (position + _f(1.0)) * _f((extent - 1) / 2)
    return ((position + _f(1.0)) * _f(float(extent)) - _f(1.0)) * _f(0.5)


def _folded(point: Any, extent: int, padding: str, corners: bool) -> Any:
    """A point brought into the image by clamping or by reflection."""
    low, high = (0.0, extent - 1.0) if corners else (-0.5, extent - 0.5)
    if padding == "reflection":
        span = high - low
        if span <= 0:
            return _f(0.0)
        distance = tirx.abs(point - _f(low))
        turns = tirx.floor(distance / _f(span))
        rest = distance - turns * _f(span)
        odd = turns - tirx.floor(turns * _f(0.5)) * _f(2.0)
        point = tirx.Select(odd > _f(0.5), _f(high) - rest, rest + _f(low))
    return tirx.max(tirx.min(point, _f(extent - 1.0)), _f(0.0))


def _grid_taps(mode: str, point: Any) -> list[tuple[Any, Any]]:
    if mode == "nearest":
        return [(tirx.nearbyint(point), _f(1.0))]
    base = tirx.floor(point)
    ratio = point - base
    if mode == "linear":
        return [(base, _f(1.0) - ratio), (base + _f(1.0), ratio)]
    a = _f(-0.75)
    r0, r3, r2 = ratio + _f(1.0), _f(2.0) - ratio, _f(1.0) - ratio

    def outer(r: Any) -> Any:
        return ((a * r - _f(5.0) * a) * r + _f(8.0) * a) * r - _f(4.0) * a

    def inner(r: Any) -> Any:
        return ((a + _f(2.0)) * r - (a + _f(3.0))) * r * r + _f(1.0)

    weights = [outer(r0), inner(ratio), inner(r2), outer(r3)]
    return [(base + _f(float(k - 1)), w) for k, w in enumerate(weights)]


def optional_has_element(op: Op) -> Operand:
    """``OptionalHasElement`` of a tensor that is there, or of nothing."""
    if op.has(0):
        op.input(0)
    return op.context.embed(np.array(op.has(0)))


CONVERTERS: dict[str, Callable[[Op], Any]] = {
    "Dropout": dropout,
    "Resize": resize,
    "GridSample": grid_sample,
    "OptionalHasElement": optional_has_element,
}
"""Converters of this family by op type."""

__all__ = ["CONVERTERS", "ir"]
