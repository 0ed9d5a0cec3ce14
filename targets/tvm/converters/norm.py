"""Normalizations, and activations that are one fused expression."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
from tvm import te, tirx

from hal.kernels.exponential import exponential
from hal.targets.tvm.converters.elementwise import (
    constant_like,
    dtype_of,
    elementwise,
    log1p,
    maximum,
)
from hal.targets.tvm.converters.reduce import fold, total
from hal.targets.tvm.converters.shape import reshaped
from hal.targets.tvm.dims import Refused, product
from hal.targets.tvm.dtypes import FLOATS
from hal.targets.tvm.lowering import Op, Operand


def _wide(x: Operand) -> str:
    return "float32" if x.stored in ("float16", "bfloat16") else x.stored


def _count(dims: Sequence[Any], dtype: str) -> Any:
    number = product(dims)
    return tirx.const(number, dtype) if isinstance(number, int) else number.astype(dtype)


def rms_normalization(op: Op) -> Operand:
    """``RMSNormalization`` over the axes from ``axis`` on."""
    x, scale = op.require(0, FLOATS), op.input(1)
    axis, epsilon = op.axis(-1, x.rank), op.attribute("epsilon", 1e-5)
    wide, inner = _wide(x), list(range(op.axis(-1, x.rank), x.rank))
    if not _stash_is_float(op):
        raise Refused("RMSNormalization with stash_type other than float")

    def kernel(tensor: Any, weight: Any) -> Any:
        ranges = [te.reduce_axis((0, tensor.shape[a]), name=f"r{a}") for a in inner]
        squares = te.compute(
            tensor.shape[:axis],
            lambda *i: te.sum(_square(tensor(*i, *ranges).astype(wide)), axis=ranges),
            name="squares",
        )
        count = _count(x.shape[axis:], wide)
        inverse = te.compute(
            squares.shape,
            lambda *i: (
                tirx.const(1.0, wide) / tirx.sqrt(squares(*i) / count + tirx.const(epsilon, wide))
            ),
            name="inverse",
        )
        lead = x.rank - scale.rank

        def element(*i: Any) -> Any:
            normal = (tensor(*i).astype(wide) * inverse(*i[:axis])).astype(x.stored)
            return (normal.astype(scale.stored) * _scaled(weight, scale, i[lead:])).astype(
                scale.stored
            )

        return te.compute(tensor.shape, element, name="rms_normalization")

    return op.te(kernel, x, scale, dtype=scale.dtype)


def _square(v: Any) -> Any:
    return v * v


def _stash_is_float(op: Op) -> bool:
    return op.attribute("stash_type", 1) == 1


def _scaled(weight: Any, operand: Operand, indices: Sequence[Any]) -> Any:
    """Element of a scale or bias that broadcasts to the trailing axes."""
    return weight(
        *(
            tirx.const(0, "int64") if d == 1 else i
            for d, i in zip(operand.shape, indices, strict=True)
        )
    )


def layer_normalization(op: Op) -> list[Operand | None]:
    """``LayerNormalization`` with its optional mean and inverse deviation."""
    x, scale, bias = op.require(0, FLOATS), op.input(1), op.optional(2)
    axis, epsilon = op.axis(-1, x.rank), op.attribute("epsilon", 1e-5)
    axes = list(range(axis, x.rank))
    mean, inverse = moments(op, x, axes, epsilon)
    operands = [x, mean, inverse, scale] + ([bias] if bias is not None else [])

    def body(v: Any, m: Any, r: Any, s: Any, *rest: Any) -> Any:
        normal = ((v.astype(_wide(x)) - m) * r).astype(x.stored)
        result = normal * s
        return result + rest[0] if rest else result

    y = elementwise(op, body, operands, x.dtype)
    return [y, mean if op.wants(1) else None, inverse if op.wants(2) else None]


def moments(op: Op, x: Operand, axes: Sequence[int], epsilon: float) -> tuple[Operand, Operand]:
    """Mean and ``1 / sqrt(variance + epsilon)`` over ``axes``, in float32 at least, axes kept."""
    wide = _wide(x)
    count = _count([x.shape[a] for a in axes], wide)
    summed = total(op, x, axes)
    mean = elementwise(op, lambda s: s / count, [summed])
    centered = elementwise(op, lambda v, m: v.astype(wide) - m, [x, mean])
    squares = total(op, centered, axes, prepare=_square)
    inverse = elementwise(
        op,
        lambda s: tirx.const(1.0, wide) / tirx.sqrt(s / count + tirx.const(epsilon, wide)),
        [squares],
    )
    return mean, inverse


def _per_channel(op: Op, x: Operand, vector: Operand) -> Operand:
    return reshaped(op, vector, [1, *vector.shape, *([1] * (x.rank - 2))])


def instance_normalization(op: Op) -> Operand:
    """``InstanceNormalization`` over the spatial axes."""
    x, scale, bias = op.require(0, FLOATS), op.input(1), op.input(2)
    mean, inverse = moments(op, x, list(range(2, x.rank)), op.attribute("epsilon", 1e-5))
    operands = [x, mean, inverse, _per_channel(op, x, scale), _per_channel(op, x, bias)]
    return elementwise(
        op,
        lambda v, m, r, s, b: ((v.astype(_wide(x)) - m) * r).astype(x.stored) * s + b,
        operands,
        x.dtype,
    )


def group_normalization(op: Op) -> Operand:
    """``GroupNormalization`` with a scale and bias per channel."""
    x, scale, bias = op.require(0, FLOATS), op.input(1), op.input(2)
    groups = op.attribute("num_groups")
    n, c, *spatial = x.shape
    if not isinstance(c, int):
        raise Refused("GroupNormalization over a dynamic number of channels")
    if scale.shape[0] != c:
        raise Refused("GroupNormalization with a scale per group")
    grouped = reshaped(op, x, [n, groups, c // groups, *spatial])
    mean, inverse = moments(
        op, grouped, list(range(2, grouped.rank)), op.attribute("epsilon", 1e-5)
    )
    normal = elementwise(
        op,
        lambda v, m, r: ((v.astype(_wide(x)) - m) * r).astype(x.stored),
        [grouped, mean, inverse],
        x.dtype,
    )
    flat = reshaped(op, normal, x.shape)
    return elementwise(
        op,
        lambda v, s, b: v * s + b,
        [flat, _per_channel(op, x, scale), _per_channel(op, x, bias)],
        x.dtype,
    )


def batch_normalization(op: Op) -> list[Operand]:
    """``BatchNormalization``; in training mode also the running statistics."""
    x, scale, bias, mean, variance = op.inputs()
    epsilon, momentum = op.attribute("epsilon", 1e-5), op.attribute("momentum", 0.9)
    training = bool(op.attribute("training_mode", 0))
    updated: list[Operand] = []
    if x.rank < 2:
        raise Refused("BatchNormalization of a vector")
    if training:
        axes = [a for a in range(x.rank) if a != 1]
        count = _count([x.shape[a] for a in axes], "float32")
        summed = total(op, x, axes)
        batch_mean = elementwise(op, lambda s: s / count, [summed])
        centered = elementwise(op, lambda v, m: v.astype("float32") - m, [x, batch_mean])
        batch_variance = elementwise(
            op, lambda s: s / count, [total(op, centered, axes, prepare=_square)]
        )
        statistics = [reshaped(op, s, mean.shape) for s in (batch_mean, batch_variance)]

        def blend(old: Any, new: Any) -> Any:
            return old * constant_like(momentum, old) + new.astype(dtype_of(old)) * constant_like(
                1 - momentum, old
            )

        updated = [
            elementwise(op, blend, [old, new], old.dtype)
            for old, new in zip((mean, variance), statistics, strict=True)
        ]
        mean, variance = statistics
    channels = [_per_channel(op, x, v) for v in (scale, bias, mean, variance)]

    def body(v: Any, s: Any, b: Any, m: Any, var: Any) -> Any:
        wide = "float32" if dtype_of(v) != "float64" else "float64"
        inverse = tirx.const(1.0, wide) / tirx.sqrt(var.astype(wide) + tirx.const(epsilon, wide))
        normal = (v.astype(wide) - m.astype(wide)) * inverse
        return (normal * s.astype(wide) + b.astype(wide)).astype(dtype_of(v))

    return [elementwise(op, body, [x, *channels], x.dtype), *updated]


def lp_normalization(op: Op) -> Operand:
    """``LpNormalization`` for p of 1 and 2; a zero norm gives 0."""
    x = op.require(0, FLOATS)
    axis, p = op.axis(-1, x.rank), op.attribute("p", 2)
    prepare = _square if p == 2 else tirx.abs
    norm = fold(op, x, [axis], lambda a, b: a + b, lambda d: tirx.const(0, d), prepare=prepare)

    def body(v: Any, s: Any) -> Any:
        length = tirx.sqrt(s) if p == 2 else s
        zero = constant_like(0, v)
        return tirx.Select(length == zero, zero, v / length)

    return elementwise(op, body, [x, norm], x.dtype)


def lrn(op: Op) -> Operand:
    """``LRN`` across channels."""
    x = op.require(0, FLOATS)
    size = op.attribute("size")
    alpha, beta, bias = (
        op.attribute("alpha", 1e-4),
        op.attribute("beta", 0.75),
        op.attribute("bias", 1.0),
    )
    channels = x.shape[1]

    def kernel(tensor: Any) -> Any:
        k = te.reduce_axis((0, size), name="k")

        def squares(*i: Any) -> Any:
            place = i[1] + k - (size - 1) // 2
            inside = tirx.And(place >= 0, place < channels)
            value = tirx.if_then_else(
                inside, _square(tensor(i[0], place, *i[2:])), tirx.const(0, x.stored)
            )
            return te.sum(value, axis=k)

        window = te.compute(tensor.shape, squares, name="window")

        def element(*i: Any) -> Any:
            base = tirx.const(bias, x.stored) + tirx.const(alpha / size, x.stored) * window(*i)
            return tensor(*i) / tirx.pow(base, tirx.const(beta, x.stored))

        return te.compute(tensor.shape, element, name="lrn")

    return op.te(kernel, x, dtype=x.dtype)


def sigmoid(x: Any) -> Any:
    """Logistic function."""
    one = constant_like(1.0, x)
    return one / (one + exponential(constant_like(0.0, x) - x))


def _activation(body: Callable[..., Any], **defaults: float) -> Callable[[Op], Operand]:
    """An activation with float attributes, computed in float32 for half precision."""

    def convert(op: Op) -> Operand:
        x = op.require(0, FLOATS)
        values = [op.attribute(name, default) for name, default in defaults.items()]

        def element(v: Any) -> Any:
            wide = v.astype(_wide(x))
            return body(wide, *(tirx.const(float(a), _wide(x)) for a in values)).astype(x.stored)

        return elementwise(op, element, [x], x.dtype)

    return convert


def _gelu(x: Any) -> Any:
    half, one = constant_like(0.5, x), constant_like(1.0, x)
    return half * x * (one + tirx.erf(x * constant_like(math.sqrt(0.5), x)))


def _gelu_tanh(x: Any) -> Any:
    half, one = constant_like(0.5, x), constant_like(1.0, x)
    inner = constant_like(math.sqrt(2 / math.pi), x) * (x + constant_like(0.044715, x) * x * x * x)
    return half * x * (one + tirx.tanh(inner))


def gelu(op: Op) -> Operand:
    """``Gelu``, exact or by tanh."""
    tanh = op.attribute("approximate", "none") == "tanh"
    return _activation(_gelu_tanh if tanh else _gelu)(op)


def swiglu(op: Op) -> Operand:
    """``SwiGLU``: the swish of a gate times a linear input."""
    a, b = op.require(0, FLOATS), op.require(1, FLOATS)
    alpha = tirx.const(op.attribute("alpha", 1.0), _wide(a))

    def body(gate: Any, up: Any) -> Any:
        wide = gate.astype(_wide(a))
        return (wide * sigmoid(alpha * wide)).astype(a.stored) * up

    return elementwise(op, body, [a, b], a.dtype)


def _hard_sigmoid(x: Any, alpha: Any, beta: Any) -> Any:
    return maximum(constant_like(0, x), tirx.min(constant_like(1, x), alpha * x + beta))


def _selu(x: Any, alpha: Any, gamma: Any) -> Any:
    zero = constant_like(0, x)
    return gamma * tirx.Select(x > zero, x, alpha * tirx.exp(x) - alpha)


def _elu(x: Any, alpha: Any) -> Any:
    return tirx.Select(x < constant_like(0, x), alpha * (tirx.exp(x) - constant_like(1, x)), x)


def _celu(x: Any, alpha: Any) -> Any:
    zero, one = constant_like(0, x), constant_like(1, x)
    return tirx.max(zero, x) + tirx.min(zero, alpha * (tirx.exp(x / alpha) - one))


def celu(op: Op) -> Operand:
    """``Celu``; in bfloat16 its definition rounds at each step, which this kernel does not."""
    if op.input(0).dtype is ir.DataType.BFLOAT16:
        raise Refused("Celu on BFLOAT16 is not implemented")
    return _activation(_celu, alpha=1.0)(op)


def _mish(x: Any) -> Any:
    soft = tirx.Select(x > constant_like(20.0, x), x, log1p(tirx.exp(x)))
    return x * tirx.tanh(soft)


def _shrink(x: Any, bias: Any, lambd: Any) -> Any:
    zero = constant_like(0, x)
    return tirx.Select(x < zero - lambd, x + bias, tirx.Select(x > lambd, x - bias, zero))


CONVERTERS: dict[str, Callable[[Op], Any]] = {
    "RMSNormalization": rms_normalization,
    "LayerNormalization": layer_normalization,
    "InstanceNormalization": instance_normalization,
    "GroupNormalization": group_normalization,
    "BatchNormalization": batch_normalization,
    "LpNormalization": lp_normalization,
    "LRN": lrn,
    "Gelu": gelu,
    "SwiGLU": swiglu,
    "Swish": _activation(lambda x, alpha: x * sigmoid(alpha * x), alpha=1.0),
    "HardSigmoid": _activation(_hard_sigmoid, alpha=0.2, beta=0.5),
    "HardSwish": _activation(
        lambda x: x * _hard_sigmoid(x, constant_like(1 / 6, x), constant_like(0.5, x))
    ),
    "LeakyRelu": _activation(
        lambda x, a: tirx.Select(x < constant_like(0, x), a * x, x), alpha=0.01
    ),
    "Selu": _activation(_selu, alpha=1.6732632423543772, gamma=1.0507009873554805),
    "Elu": _activation(_elu, alpha=1.0),
    "Celu": celu,
    "Mish": _activation(_mish),
    "ThresholdedRelu": _activation(
        lambda x, a: tirx.Select(x > a, x, constant_like(0, x)), alpha=1.0
    ),
    "Shrink": _activation(_shrink, bias=0.0, lambd=0.5),
}
"""Converters of this family by op type."""

__all__ = ["CONVERTERS", "ir", "moments", "sigmoid"]
