"""Elementwise arithmetic, comparisons, logic and activations."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import te, tirx

from hal.kernels.exponential import exponential
from hal.targets.tvm import contents
from hal.targets.tvm.dims import Dim, Refused
from hal.targets.tvm.dtypes import FLOATS, INTEGERS, NUMBERS, PLAIN, SIGNED
from hal.targets.tvm.lowering import Op, Operand

_BOOL = frozenset({ir.DataType.BOOL})


def broadcast_index(
    tensor: Any, indices: Sequence[Any], shape: Sequence[Dim], out: Sequence[Dim]
) -> Any:
    """The element of ``tensor`` that broadcasts to ``indices`` of a result of shape ``out``."""
    offset = len(out) - len(shape)
    picked = []
    for axis, dim in enumerate(shape):
        index = indices[offset + axis]
        target = out[offset + axis]
        if isinstance(dim, int):
            picked.append(tirx.const(0, "int64") if dim == 1 and target != 1 else index)
        elif isinstance(target, int) or not target.same_as(dim):
            picked.append(tirx.Select(dim == 1, tirx.const(0, "int64"), index))
        else:
            picked.append(index)
    return tensor(*picked)


def elementwise(
    op: Op, body: Callable[..., Any], operands: Sequence[Operand], dtype: Any = None
) -> Operand:
    """Apply ``body`` to the broadcast elements of ``operands``."""
    shape = op.symbols.broadcast([o.shape for o in operands])

    def element(*args: Any) -> Any:
        *tensors, indices = args
        return body(
            *(
                broadcast_index(t, indices, _same(op, o.shape, shape), shape)
                for t, o in zip(tensors, operands, strict=True)
            )
        )

    return op.compute(shape, element, *operands, dtype=dtype)


def _same(op: Op, shape: Sequence[Dim], out: Sequence[Dim]) -> list[Dim]:
    """``shape`` with dims that equal the result's replaced by the result's own expression."""
    offset = len(out) - len(shape)
    return [
        out[offset + i] if not isinstance(d, int) and op.symbols.equal(d, out[offset + i]) else d
        for i, d in enumerate(shape)
    ]


def _unary(
    body: Callable[[Any], Any], allowed: frozenset[ir.DataType] = FLOATS
) -> Callable[[Op], Operand]:
    def convert(op: Op) -> Operand:
        x = op.require(0, allowed)
        return elementwise(op, body, [x], x.dtype)

    return convert


def _through_float32(body: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Compute in float32 what has half-precision operands."""

    def wide(x: Any) -> Any:
        if str(x.ty.dtype) in ("float16", "bfloat16"):
            return body(x.astype("float32")).astype(str(x.ty.dtype))
        return body(x)

    return wide


def _float_unary(body: Callable[[Any], Any]) -> Callable[[Op], Operand]:
    return _unary(_through_float32(body))


def constant_like(value: float, x: Any) -> Any:
    """``value`` in the dtype of ``x``."""
    return tirx.const(value, dtype_of(x))


def dtype_of(x: Any) -> str:
    """Dtype of a scalar expression."""
    return str(x.ty.dtype)


def _binary(
    body: Callable[[Any, Any], Any],
    allowed: frozenset[ir.DataType],
    result: ir.DataType | None = None,
) -> Callable[[Op], Operand]:
    def convert(op: Op) -> Operand:
        a, b = op.require(0, allowed), op.require(1, allowed)
        if a.dtype != b.dtype:
            raise Refused(f"operands of {op.node.op_type} have different dtypes")
        known = contents.binary(op.symbols, op.node.op_type, a, b)
        if known is not None:
            return op.context.from_content(known, result or a.dtype)
        return elementwise(op, body, [a, b], result or a.dtype)

    return convert


def _is_float(x: Any) -> bool:
    return "float" in dtype_of(x)


def _divide(a: Any, b: Any) -> Any:
    if _is_float(a):
        return a / b
    return tirx.truncdiv(a, b)


def power(a: Any, b: Any) -> Any:
    """``a ** b`` in the dtype of ``a``; small constant exponents become products."""
    dtype = dtype_of(a)
    if isinstance(b, (tirx.FloatImm, tirx.IntImm)):
        exponent = float(b.value)
        if exponent == 2.0:
            return a * a
        if exponent == 3.0:
            return a * a * a
        if exponent == 0.5 and "float" in dtype:
            return tirx.sqrt(a)
    wide = "float64" if dtype in ("int64", "int32", "float64", "uint32", "uint64") else "float32"
    result = tirx.pow(a.astype(wide), b.astype(wide))
    if "int" in dtype:
        result = tirx.round(result)
    return result.astype(dtype)


def pow_(op: Op) -> Operand:
    """``Pow``: base and exponent may differ in dtype."""
    a, b = op.require(0, NUMBERS), op.require(1, NUMBERS)
    exponent = op.constant(1)
    if exponent is not None and exponent.size == 1:
        value = tirx.const(float(exponent.reshape(())), "float64")
        shape = op.symbols.broadcast([a.shape, b.shape])
        if len(shape) == a.rank:
            return elementwise(op, lambda x: power(x, value), [a], a.dtype)
    return elementwise(op, power, [a, b], a.dtype)


def mod(op: Op) -> Operand:
    """``Mod``: sign of the divisor for integers, of the dividend with ``fmod=1``."""
    a, b = op.require(0, NUMBERS), op.require(1, NUMBERS)
    fmod = bool(op.attribute("fmod", 0))
    known = contents.binary(op.symbols, "Mod", a, b) if not fmod else None
    if known is not None:
        return op.context.from_content(known, a.dtype)

    def body(x: Any, y: Any) -> Any:
        dtype = dtype_of(x)
        rest = float_remainder(x, y) if "float" in dtype else tirx.truncmod(x, y)
        if fmod or dtype.startswith("uint"):
            return rest
        zero = tirx.const(0, dtype)
        opposite = either_only(rest < zero, y < zero)
        return tirx.Select(tirx.And(rest != zero, opposite), rest + y, rest)

    return elementwise(op, body, [a, b], a.dtype)


def float_remainder(x: Any, y: Any) -> Any:
    """C's ``fmod`` (the intrinsic of that name has no lowering on this code generator)."""
    dtype = dtype_of(x)
    if dtype == "float64":
        return tirx.call_pure_extern("float64", "fmod", x, y)
    wide = tirx.call_pure_extern("float32", "fmodf", x.astype("float32"), y.astype("float32"))
    return wide.astype(dtype)


def either_only(a: Any, b: Any) -> Any:
    """Exclusive or of conditions (``!=`` on bool does not compile)."""
    return tirx.Or(tirx.And(a, tirx.Not(b)), tirx.And(tirx.Not(a), b))


def _variadic(body: Callable[[Any, Any], Any]) -> Callable[[Op], Operand]:
    def convert(op: Op) -> Operand:
        operands = [op.require(i, NUMBERS) for i in range(len(op.node.inputs))]
        if len(operands) == 1:
            return operands[0]
        if len(operands) == 2:
            known = contents.binary(op.symbols, op.node.op_type, *operands)
            if known is not None:
                return op.context.from_content(known, operands[0].dtype)

        def fold(*items: Any) -> Any:
            result = items[0]
            for item in items[1:]:
                result = body(result, item)
            return result

        return elementwise(op, fold, operands, operands[0].dtype)

    return convert


def truth(x: Any) -> Any:
    """Whether a scalar of any dtype is not zero."""
    return x if dtype_of(x) == "bool" else x != tirx.const(0, dtype_of(x))


def is_nan(x: Any) -> Any:
    """Whether a float is NaN (``x != x`` is simplified away)."""
    return tirx.isnan(x.astype("float32") if dtype_of(x) in ("float16", "bfloat16") else x)


def _nan_first(pick: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Minimum or maximum in which a NaN wins, as in NumPy."""

    def body(a: Any, b: Any) -> Any:
        if not _is_float(a):
            return pick(a, b)
        return tirx.Select(is_nan(a), a, tirx.Select(is_nan(b), b, pick(a, b)))

    return body


maximum = _nan_first(tirx.max)
minimum = _nan_first(tirx.min)


def mean(op: Op) -> Operand:
    """``Mean`` of any number of tensors."""
    operands = [op.require(i, FLOATS) for i in range(len(op.node.inputs))]

    def body(*items: Any) -> Any:
        total = items[0]
        for item in items[1:]:
            total = total + item
        return total / constant_like(float(len(items)), total)

    return elementwise(op, body, operands, operands[0].dtype)


def _equal(a: Any, b: Any) -> Any:
    if dtype_of(a) == "bool":
        return tirx.Not(either_only(a, b))
    return a == b


def where(op: Op) -> Operand:
    """``Where(condition, x, y)`` with broadcasting."""
    condition, x, y = op.require(0, _BOOL), op.input(1), op.input(2)
    known = contents.where(op.symbols, condition, x, y)
    if known is not None:
        return op.context.from_content(known, x.dtype)
    return elementwise(op, lambda c, a, b: tirx.Select(c, a, b), [condition, x, y], x.dtype)


def clip(op: Op) -> Operand:
    """``Clip`` with optional scalar bounds."""
    x = op.require(0, NUMBERS)
    low, high = op.optional(1), op.optional(2)
    attributes = [op.attribute("min"), op.attribute("max")]
    if any(a is not None for a in attributes):
        limits = [
            None if a is None else op.context.embed(np.array(a, x.stored), x.dtype)
            for a in attributes
        ]
        low, high = limits[0] or low, limits[1] or high
    bounds = [b for b in (low, high) if b is not None]

    def body(value: Any, *limits: Any) -> Any:
        items = list(limits)
        result = value
        if low is not None:
            result = maximum(result, items.pop(0))
        if high is not None:
            result = minimum(result, items.pop(0))
        return result

    scalars = [op.context.emit_scalar(b) for b in bounds]
    return elementwise(op, body, [x, *scalars], x.dtype)


def identity(op: Op) -> Operand:
    """``Identity``: the same operand."""
    return op.input(0)


def not_(op: Op) -> Operand:
    """``Not``."""
    x = op.require(0, _BOOL)
    if x.content is not None and all(isinstance(i, (bool, int)) for i in x.content.flat):
        return op.context.from_content(contents.mapped(x.content, lambda i: not i), x.dtype)
    return elementwise(op, tirx.Not, [x], x.dtype)


def _compare(body: Callable[[Any, Any], Any], allowed: frozenset[ir.DataType] = NUMBERS) -> Any:
    return _binary(body, allowed, ir.DataType.BOOL)


def _logical(body: Callable[[Any, Any], Any]) -> Any:
    return _binary(body, _BOOL, ir.DataType.BOOL)


def sign(x: Any) -> Any:
    """-1, 0 or 1; NaN stays."""
    zero, one = constant_like(0, x), constant_like(1, x)
    if dtype_of(x).startswith("uint"):
        return tirx.Select(x > zero, one, zero)
    result = tirx.Select(x > zero, one, tirx.Select(x < zero, constant_like(-1, x), zero))
    return tirx.Select(is_nan(x), x, result) if _is_float(x) else result


def _absolute(x: Any) -> Any:
    if dtype_of(x).startswith("uint"):
        return x
    if _is_float(x):
        return tirx.abs(x)
    return tirx.Select(x < constant_like(0, x), constant_like(0, x) - x, x)


def round_half_even(x: Any) -> Any:
    """Nearest integer, ties to even."""
    return tirx.nearbyint(x)


def is_inf(op: Op) -> Operand:
    """``IsInf`` with its two switches."""
    x = op.require(0, FLOATS)
    positive, negative = op.attribute("detect_positive", 1), op.attribute("detect_negative", 1)

    def body(v: Any) -> Any:
        infinity = tirx.const(float("inf"), dtype_of(v))
        hits = []
        if positive:
            hits.append(v == infinity)
        if negative:
            hits.append(v == tirx.const(float("-inf"), dtype_of(v)))
        if not hits:
            return tirx.const(False, "bool")
        return hits[0] if len(hits) == 1 else tirx.Or(*hits)

    return elementwise(op, body, [x], ir.DataType.BOOL)


def bit_shift(op: Op) -> Operand:
    """``BitShift``; a shift beyond the width, or a negative one, shifts everything out."""
    a, b = op.require(0, INTEGERS), op.require(1, INTEGERS)
    left = op.attribute("direction") == "LEFT"

    def body(x: Any, y: Any) -> Any:
        bits = int("".join(c for c in dtype_of(x) if c.isdigit()))
        limit = constant_like(bits - 1, x)
        signed = not dtype_of(x).startswith("uint")
        beyond = tirx.Or(y > limit, y < constant_like(0, y)) if signed else y > limit
        amount = tirx.Select(beyond, limit, y)
        shifted = x << amount if left else x >> amount
        if left or not signed:
            return tirx.Select(beyond, constant_like(0, x), shifted)
        return shifted

    return elementwise(op, body, [a, b], a.dtype)


def prelu(op: Op) -> Operand:
    """``PRelu``: the slope broadcasts."""
    x, slope = op.require(0, NUMBERS), op.input(1)
    return elementwise(
        op, lambda v, s: tirx.Select(v < constant_like(0, v), v * s, v), [x, slope], x.dtype
    )


def erf(x: Any) -> Any:
    """Gauss error function."""
    return tirx.erf(x)


def log1p(x: Any) -> Any:
    """``log(1 + x)``, exact for small ``x``."""
    if dtype_of(x) == "float64":
        return tirx.call_pure_extern("float64", "log1p", x)
    return tirx.call_pure_extern("float32", "log1pf", x)


UNARY_FLOAT: dict[str, Callable[[Any], Any]] = {
    "Acos": tirx.acos,
    "Acosh": tirx.acosh,
    "Asin": tirx.asin,
    "Asinh": tirx.asinh,
    "Atan": tirx.atan,
    "Atanh": tirx.atanh,
    "Ceil": tirx.ceil,
    "Cos": tirx.cos,
    "Cosh": tirx.cosh,
    "Erf": erf,
    "Exp": tirx.exp,
    "Floor": tirx.floor,
    "Log": tirx.log,
    "Reciprocal": lambda x: constant_like(1.0, x) / x,
    "Round": round_half_even,
    "Sigmoid": lambda x: (
        constant_like(1.0, x) / (constant_like(1.0, x) + exponential(constant_like(0.0, x) - x))
    ),
    "Sin": tirx.sin,
    "Sinh": tirx.sinh,
    "Sqrt": tirx.sqrt,
    "Tan": tirx.tan,
    "Tanh": tirx.tanh,
    "Softsign": lambda x: x / (constant_like(1.0, x) + tirx.abs(x)),
    "Softplus": lambda x: tirx.Select(x > constant_like(20.0, x), x, log1p(tirx.exp(x))),
}

CONVERTERS: dict[str, Callable[[Op], Any]] = {
    **{name: _float_unary(body) for name, body in UNARY_FLOAT.items()},
    "Abs": _unary(_absolute, NUMBERS),
    "Neg": _unary(
        lambda x: constant_like(0, x) - x if not _is_float(x) else constant_like(-1, x) * x,
        FLOATS | SIGNED,
    ),
    "Sign": _unary(sign, NUMBERS),
    "Relu": _unary(lambda x: maximum(x, constant_like(0, x)), FLOATS | SIGNED),
    "BitwiseNot": _unary(lambda x: tirx.bitwise_not(x), INTEGERS),
    "IsNaN": lambda op: elementwise(op, is_nan, [op.require(0, FLOATS)], ir.DataType.BOOL),
    "IsInf": is_inf,
    "Identity": identity,
    "Not": not_,
    "Add": _binary(operator.add, NUMBERS),
    "Sub": _binary(operator.sub, NUMBERS),
    "Mul": _binary(operator.mul, NUMBERS),
    "Div": _binary(_divide, NUMBERS),
    "Pow": pow_,
    "Mod": mod,
    "Max": _variadic(maximum),
    "Min": _variadic(minimum),
    "Sum": _variadic(operator.add),
    "Mean": mean,
    "Where": where,
    "Clip": clip,
    "PRelu": prelu,
    "BitShift": bit_shift,
    "BitwiseAnd": _binary(tirx.bitwise_and, INTEGERS),
    "BitwiseOr": _binary(tirx.bitwise_or, INTEGERS),
    "BitwiseXor": _binary(tirx.bitwise_xor, INTEGERS),
    "And": _logical(tirx.And),
    "Or": _logical(tirx.Or),
    "Xor": _logical(either_only),
    "Equal": _compare(_equal, PLAIN),
    "Greater": _compare(lambda a, b: a > b),
    "GreaterOrEqual": _compare(lambda a, b: a >= b),
    "Less": _compare(lambda a, b: a < b),
    "LessOrEqual": _compare(lambda a, b: a <= b),
}
"""Converters of this family by op type."""

__all__ = ["CONVERTERS", "broadcast_index", "constant_like", "dtype_of", "elementwise", "te"]
