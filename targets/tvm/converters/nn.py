"""Convolutions and pooling in any number of spatial dims."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
from tvm import te, tirx

from hal.targets.tvm.converters.elementwise import elementwise, is_nan
from hal.targets.tvm.converters.matmul import accumulator, flatten_scalar, requantize
from hal.targets.tvm.converters.reduce import fold, scaled_mean, total
from hal.targets.tvm.converters.shape import reshaped
from hal.targets.tvm.dims import Dim, Refused, floordiv, product
from hal.targets.tvm.dtypes import FLOATS, INTEGERS
from hal.targets.tvm.lowering import Op, Operand

_BYTES = frozenset({ir.DataType.INT8, ir.DataType.UINT8})


def _const(dim: Dim) -> Any:
    return tirx.const(dim, "int64") if isinstance(dim, int) else dim


class Window:
    """Kernel, strides, dilations and pads of a sliding-window op, and the extents that result."""

    def __init__(self, op: Op, spatial: Sequence[Dim], kernel: Sequence[Dim]) -> None:
        rank = len(spatial)
        self.kernel = list(kernel)
        self.strides = op.attribute("strides") or [1] * rank
        self.dilations = op.attribute("dilations") or [1] * rank
        self.ceil = bool(op.attribute("ceil_mode", 0))
        spans = [(k - 1) * d + 1 for k, d in zip(kernel, self.dilations, strict=True)]
        auto = op.attribute("auto_pad", "NOTSET")
        pads = op.attribute("pads") or [0] * (2 * rank)
        self.before: list[Dim] = pads[:rank]
        self.after: list[Dim] = pads[rank:]
        if auto == "VALID":
            self.before, self.after = [0] * rank, [0] * rank
        elif auto in ("SAME_UPPER", "SAME_LOWER"):
            self._same(spatial, spans, auto)
        self.out = [self._extent(spatial[a], spans[a], a) for a in range(rank)]
        self.out = [op.symbols.simplify(d) for d in self.out]

    def _same(self, spatial: Sequence[Dim], spans: Sequence[Dim], auto: str) -> None:
        if not all(isinstance(d, int) for d in spatial):
            raise Refused("auto_pad on a dynamic shape")
        before, after = [], []
        for extent, span, stride in zip(spatial, spans, self.strides, strict=True):
            out = -(-extent // stride)
            amount = max(0, (out - 1) * stride + span - extent)
            small, large = amount // 2, amount - amount // 2
            before.append(small if auto == "SAME_UPPER" else large)
            after.append(large if auto == "SAME_UPPER" else small)
        self.before, self.after = before, after

    def _extent(self, extent: Dim, span: Dim, axis: int) -> Dim:
        stride = self.strides[axis]
        room = extent + self.before[axis] + self.after[axis] - span
        if not self.ceil:
            return floordiv(room, stride) + 1
        if not isinstance(room, int):
            raise Refused("ceil_mode on a dynamic shape")
        out = -(-room // stride) + 1
        if (out - 1) * stride >= extent + self.before[axis]:
            out -= 1
        return out

    def place(self, axis: int, out: Any, k: Any) -> Any:
        """Input position that window element ``k`` of output ``out`` reads."""
        return out * self.strides[axis] + k * self.dilations[axis] - self.before[axis]

    def padded(self, axis: int) -> bool:
        """Whether windows reach outside of the input along ``axis``."""
        return self.ceil or self.before[axis] != 0 or self.after[axis] != 0


def _inside(window: Window, places: Sequence[Any], spatial: Sequence[Dim]) -> list[Any]:
    conditions = []
    for axis, place in enumerate(places):
        if window.padded(axis):
            conditions += [place >= 0, place < _const(spatial[axis])]
    return conditions


def convolve(op: Op, x: Operand, w: Operand, bias: Operand | None) -> Operand:
    """Grouped convolution of ``[N, C, ...]`` with ``[M, C / group, ...]``."""
    groups = op.attribute("group", 1)
    spatial = x.shape[2:]
    window = Window(op, spatial, w.shape[2:])
    m, per_group = w.shape[0], w.shape[1]
    if not (isinstance(m, int) and isinstance(per_group, int)):
        raise Refused("Conv with weights of dynamic shape")
    wide = accumulator(x.stored)
    rank = len(spatial)

    def kernel(data: Any, weights: Any, *rest: Any) -> Any:
        padded = data
        if any(window.padded(a) for a in range(rank)):
            padded = te.compute(
                [*data.shape[:2]]
                + [_const(spatial[a] + window.before[a] + window.after[a]) for a in range(rank)],
                lambda *i: _padded_element(data, i, window, spatial, x.stored),
                name="padded",
            )
        c = te.reduce_axis((0, _const(per_group)), name="c")
        ks = [te.reduce_axis((0, _const(k)), name=f"k{a}") for a, k in enumerate(w.shape[2:])]

        def element(*i: Any) -> Any:
            n, o, *places = i
            channel = c if groups == 1 else tirx.floordiv(o, m // groups) * per_group + c
            at = [p * window.strides[a] + ks[a] * window.dilations[a] for a, p in enumerate(places)]
            return te.sum(
                padded(n, channel, *at).astype(wide) * weights(o, c, *ks).astype(wide),
                axis=[c, *ks],
            )

        result = te.compute([_const(d) for d in (x.shape[0], m, *window.out)], element, name="conv")
        if not rest and wide == x.stored:
            return result
        return te.compute(
            result.shape,
            lambda *i: (
                result(*i) + (rest[0](i[1]).astype(wide) if rest else tirx.const(0, wide))
            ).astype(x.stored),
            name="biased",
        )

    return op.te(kernel, x, w, *([bias] if bias is not None else []), dtype=x.dtype)


def _padded_element(
    data: Any, i: Sequence[Any], window: Window, spatial: Sequence[Dim], stored: str
) -> Any:
    places = [p - window.before[a] for a, p in enumerate(i[2:])]
    inside = _inside(window, places, spatial)
    return tirx.if_then_else(tirx.all(*inside), data(*i[:2], *places), tirx.const(0, stored))


def conv(op: Op) -> Operand:
    """``Conv``."""
    return convolve(op, op.require(0, FLOATS), op.input(1), op.optional(2))


def _centered(op: Op, x: Operand, zero: Operand | None, axis: int) -> Operand:
    if zero is None:
        return elementwise(op, lambda v: v.astype("int32"), [x], ir.DataType.INT32)
    if zero.rank == 1:
        dims = [zero.shape[0] if a == axis else 1 for a in range(x.rank)]
        zero = reshaped(op, zero, dims)
    return elementwise(
        op, lambda v, z: v.astype("int32") - z.astype("int32"), [x, zero], ir.DataType.INT32
    )


def conv_integer(op: Op) -> Operand:
    """``ConvInteger``: int32 result of 8-bit operands."""
    x, w = op.require(0, _BYTES), op.require(1, _BYTES)
    return convolve(
        op, _centered(op, x, op.optional(2), 1), _centered(op, w, op.optional(3), 0), None
    )


def qlinear_conv(op: Op) -> Operand:
    """``QLinearConv``."""
    x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero = (op.input(i) for i in range(8))
    if not {x.dtype, w.dtype, y_zero.dtype} <= _BYTES:
        raise Refused("QLinearConv on other dtypes than int8 and uint8")
    x_zero = flatten_scalar(op, x_zero)
    result = convolve(op, _centered(op, x, x_zero, 1), _centered(op, w, w_zero, 0), op.optional(8))
    if w_scale.rank == 1 and w_scale.shape[0] != 1:
        w_scale = reshaped(op, w_scale, [1, w_scale.shape[0], *([1] * (x.rank - 2))])
    return requantize(op, result, [x_scale, w_scale], y_scale, y_zero)


def conv_transpose(op: Op) -> Operand:
    """``ConvTranspose``: each output gathers the inputs that reach it."""
    x, w, bias = op.require(0, FLOATS), op.input(1), op.optional(2)
    rank, groups = x.rank - 2, op.attribute("group", 1)
    strides = op.attribute("strides") or [1] * rank
    dilations = op.attribute("dilations") or [1] * rank
    kernel_shape = w.shape[2:]
    if not all(isinstance(d, int) for d in (*x.shape[1:], *w.shape)):
        raise Refused("ConvTranspose on a dynamic shape")
    before, out = _transpose_geometry(op, x.shape[2:], kernel_shape, strides, dilations)
    channels, per_group = x.shape[1] // groups, w.shape[1]

    def kernel(data: Any, weights: Any, *rest: Any) -> Any:
        c = te.reduce_axis((0, _const(channels)), name="c")
        ks = [te.reduce_axis((0, _const(k)), name=f"k{a}") for a, k in enumerate(kernel_shape)]

        def element(*i: Any) -> Any:
            n, o, *places = i
            group = tirx.floordiv(o, per_group)
            reached, conditions = [], []
            for a, place in enumerate(places):
                offset = place + before[a] - ks[a] * dilations[a]
                source = tirx.floordiv(offset, strides[a])
                conditions += [
                    tirx.floormod(offset, strides[a]) == 0,
                    source >= 0,
                    source < _const(x.shape[2 + a]),
                ]
                reached.append(source)
            channel = group * channels + c
            value = tirx.if_then_else(
                tirx.all(*conditions),
                data(n, channel, *reached) * weights(channel, tirx.floormod(o, per_group), *ks),
                tirx.const(0, x.stored),
            )
            return te.sum(value, axis=[c, *ks])

        result = te.compute(
            [_const(d) for d in (x.shape[0], per_group * groups, *out)],
            element,
            name="conv_transpose",
        )
        if not rest:
            return result
        return te.compute(result.shape, lambda *i: result(*i) + rest[0](i[1]), name="biased")

    return op.te(kernel, x, w, *([bias] if bias is not None else []), dtype=x.dtype)


def _transpose_geometry(
    op: Op,
    spatial: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> tuple[list[int], list[int]]:
    """Leading pads and result extents of a transposed convolution."""
    rank = len(spatial)
    extra = op.attribute("output_padding") or [0] * rank
    pads = op.attribute("pads") or [0] * (2 * rank)
    auto = op.attribute("auto_pad", "NOTSET")
    wanted = op.attribute("output_shape")
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    full = [s * (n - 1) + e + p for s, n, e, p in zip(strides, spatial, extra, spans, strict=True)]
    if auto in ("SAME_UPPER", "SAME_LOWER") and wanted is None:
        wanted = [n * s for n, s in zip(spatial, strides, strict=True)]
    if wanted is None:
        out = [f - pads[a] - pads[a + rank] for a, f in enumerate(full)]
        return list(pads[:rank]), out
    wanted = list(wanted)[-rank:]
    amounts = [f - w for f, w in zip(full, wanted, strict=True)]
    upper = auto == "SAME_UPPER"
    before = [a // 2 if upper else a - a // 2 for a in amounts]
    return before, wanted


def _pool_window(op: Op, x: Operand) -> Window:
    kernel = op.attribute("kernel_shape")
    return Window(op, x.shape[2:], kernel)


def max_pool(op: Op) -> list[Operand]:
    """``MaxPool`` with the optional indices."""
    x = op.require(0, FLOATS | INTEGERS)
    window = _pool_window(op, x)
    spatial = x.shape[2:]
    lowest = tirx.const(float("-inf"), x.stored) if x.dtype in FLOATS else tirx.min_value(x.stored)

    def kernel(data: Any) -> Any:
        ks = [te.reduce_axis((0, k), name=f"k{a}") for a, k in enumerate(window.kernel)]

        def element(*i: Any) -> Any:
            places = [window.place(a, o, ks[a]) for a, o in enumerate(i[2:])]
            inside = _inside(window, places, spatial)
            value = data(*i[:2], *places)
            if inside:
                value = tirx.if_then_else(tirx.all(*inside), value, lowest)
            return te.max(value, axis=ks)

        return te.compute(
            [_const(d) for d in (*x.shape[:2], *window.out)], element, name="max_pool"
        )

    pooled = op.te(kernel, x, dtype=x.dtype)
    if not op.wants(1):
        return [pooled]
    return [pooled, _max_indices(op, x, pooled, window)]


def _max_indices(op: Op, x: Operand, pooled: Operand, window: Window) -> Operand:
    """Flat index of the first element of each window that equals its maximum."""
    spatial = x.shape[2:]
    if not all(isinstance(d, int) for d in x.shape):
        raise Refused("indices of MaxPool on a dynamic shape")
    column_major = bool(op.attribute("storage_order", 0))
    largest = tirx.max_value("int64")

    def kernel(data: Any, best: Any) -> Any:
        ks = [te.reduce_axis((0, k), name=f"k{a}") for a, k in enumerate(window.kernel)]

        def element(*i: Any) -> Any:
            places = [window.place(a, o, ks[a]) for a, o in enumerate(i[2:])]
            inside = _inside(window, places, spatial)
            order = range(len(spatial))
            flat: Any = tirx.const(0, "int64")
            for a in reversed(order) if column_major else order:
                flat = flat * _const(spatial[a]) + places[a]
            plane = math.prod(spatial)
            flat = flat + (i[0] * _const(x.shape[1]) + i[1]) * plane
            hit = data(*i[:2], *places) == best(*i)
            conditions = tirx.all(*inside, hit) if inside else hit
            return te.min(tirx.if_then_else(conditions, flat, largest), axis=ks)

        return te.compute(best.shape, element, name="indices")

    return op.te(kernel, x, pooled, dtype=ir.DataType.INT64)


def _pool_sum(
    op: Op, x: Operand, window: Window, prepare: Callable[[Any], Any], wide: str
) -> Operand:
    spatial = x.shape[2:]

    def kernel(data: Any) -> Any:
        ks = [te.reduce_axis((0, k), name=f"k{a}") for a, k in enumerate(window.kernel)]

        def element(*i: Any) -> Any:
            places = [window.place(a, o, ks[a]) for a, o in enumerate(i[2:])]
            inside = _inside(window, places, spatial)
            value = prepare(data(*i[:2], *places).astype(wide))
            if inside:
                value = tirx.if_then_else(tirx.all(*inside), value, tirx.const(0, wide))
            return te.sum(value, axis=ks)

        return te.compute(
            [_const(d) for d in (*x.shape[:2], *window.out)], element, name="pool_sum"
        )

    return op.te(kernel, x)


def average_pool(op: Op) -> Operand:
    """``AveragePool``; with or without the padding in the count."""
    x = op.require(0, FLOATS)
    window = _pool_window(op, x)
    spatial = x.shape[2:]
    wide = accumulator(x.stored)
    summed = _pool_sum(op, x, window, lambda v: v, wide)
    whole = bool(op.attribute("count_include_pad", 0))

    def body(s: Any, i: Any) -> Any:
        count: Any = tirx.const(1, "int64")
        for a, o in enumerate(i[2:]):
            low = -window.before[a] if whole else 0
            high = spatial[a] + window.after[a] if whole else spatial[a]
            hits: Any = tirx.const(0, "int64")
            for k in range(window.kernel[a]):
                place = window.place(a, o, k)
                hits = hits + tirx.And(place >= low, place < _const(high)).astype("int64")
            count = count * hits
        return (s(*i) / count.astype(wide)).astype(x.stored)

    return op.compute(summed.shape, body, summed, dtype=x.dtype)


def lp_pool(op: Op) -> Operand:
    """``LpPool``."""
    x = op.require(0, FLOATS)
    p = op.attribute("p", 2)
    wide = accumulator(x.stored)

    def prepare(v: Any) -> Any:
        if p == 1:
            return tirx.abs(v)
        if p == 2:
            return v * v
        return tirx.pow(tirx.abs(v), tirx.const(float(p), wide))

    summed = _pool_sum(op, x, _pool_window(op, x), prepare, wide)
    root = {1: lambda v: v, 2: tirx.sqrt}.get(p, lambda v: tirx.pow(v, tirx.const(1.0 / p, wide)))
    return elementwise(op, lambda v: root(v).astype(x.stored), [summed], x.dtype)


def global_average_pool(op: Op) -> Operand:
    """``GlobalAveragePool``."""
    x = op.require(0, FLOATS)
    axes = list(range(2, x.rank))
    return scaled_mean(op, x, total(op, x, axes), product(x.shape[2:]))


def global_max_pool(op: Op) -> Operand:
    """``GlobalMaxPool``."""
    x = op.require(0, FLOATS)
    axes = list(range(2, x.rank))
    return fold(op, x, axes, tirx.max, lambda d: tirx.const(float("-inf"), d))


def col2im(op: Op) -> Operand:
    """``Col2Im``: overlapping columns added back into an image."""
    x = op.require(0, FLOATS)
    declared = op.declared()
    image = [int(v) for v in declared[2:]] if declared else op.needs(1, "image shape").tolist()
    raw_block = op.constant(2)
    if raw_block is None:
        raise Refused("the block shape of Col2Im must be known at compile time")
    block = [int(b) for b in raw_block]
    rank = len(block)
    strides = op.attribute("strides") or [1] * rank
    dilations = op.attribute("dilations") or [1] * rank
    pads = op.attribute("pads") or [0] * (2 * rank)
    counts = [
        (image[a] + pads[a] + pads[a + rank] - dilations[a] * (block[a] - 1) - 1) // strides[a] + 1
        for a in range(rank)
    ]
    channels = floordiv(x.shape[1], math.prod(block))

    def body(columns: Any, i: Any) -> Any:
        result: Any = tirx.const(0, x.stored)
        for offsets in itertools.product(*(range(b) for b in block)):
            element, place, conditions = 0, tirx.const(0, "int64"), []
            for a in range(rank):
                distance = i[2 + a] + pads[a] - offsets[a] * dilations[a]
                step = tirx.floordiv(distance, strides[a])
                conditions += [
                    tirx.floormod(distance, strides[a]) == 0,
                    step >= 0,
                    step < counts[a],
                ]
                place = place * counts[a] + step
                element = element * block[a] + offsets[a]
            row = i[1] * math.prod(block) + element
            result = result + tirx.if_then_else(
                tirx.all(*conditions), columns(i[0], row, place), tirx.const(0, x.stored)
            )
        return result

    return op.compute([x.shape[0], channels, *image], body, x, dtype=x.dtype)


CONVERTERS: dict[str, Callable[[Op], Any]] = {
    "Conv": conv,
    "ConvInteger": conv_integer,
    "QLinearConv": qlinear_conv,
    "ConvTranspose": conv_transpose,
    "MaxPool": max_pool,
    "AveragePool": average_pool,
    "LpPool": lp_pool,
    "GlobalAveragePool": global_average_pool,
    "GlobalMaxPool": global_max_pool,
    "Col2Im": col2im,
}
"""Converters of this family by op type."""

__all__ = ["CONVERTERS", "is_nan"]
