"""Numeric forms that several fusions look for, however they are written."""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx_ir as ir

from hal.passes._edit import (
    attribute,
    ints,
    is_constant,
    is_op,
    is_scalar,
    operand_orders,
    producer,
    rank,
    scalar,
)


def over_root(node: ir.Node) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Readings of ``node`` as ``x / sqrt(v)``: pairs ``(x, v)``."""
    if is_op(node, "Div"):
        root = producer(node.inputs[1], "Sqrt")
        if root is not None and node.inputs[0] is not None and root.inputs[0] is not None:
            yield node.inputs[0], root.inputs[0]
    elif is_op(node, "Mul"):
        for x, factor in operand_orders(node):
            radicand = inverse_root(factor)
            if radicand is not None:
                yield x, radicand


def inverse_root(value: ir.Value) -> ir.Value | None:
    """``v`` if ``value`` is ``1 / sqrt(v)`` in one of its spellings."""
    inverse = producer(value, "Reciprocal", "Div", "Pow", "Sqrt")
    if inverse is None:
        return None
    if inverse.op_type == "Pow":
        return inverse.inputs[0] if is_scalar(inverse.inputs[1], -0.5) else None
    if inverse.op_type == "Sqrt":
        inner = producer(inverse.inputs[0], "Reciprocal")
        return inner.inputs[0] if inner is not None else None
    if inverse.op_type == "Div" and not is_scalar(inverse.inputs[0], 1.0):
        return None
    root = producer(inverse.inputs[0 if inverse.op_type == "Reciprocal" else 1], "Sqrt")
    return root.inputs[0] if root is not None else None


def plus_epsilon(value: ir.Value) -> tuple[ir.Value, float] | None:
    """``(v, epsilon)`` if ``value`` is ``v + epsilon`` with a small positive constant."""
    added = producer(value, "Add")
    if added is None:
        return None
    for source, other in operand_orders(added):
        epsilon = scalar(other)
        if epsilon is not None and 0 <= epsilon < 0.1:
            return source, epsilon
    return None


def square(value: ir.Value) -> ir.Value | None:
    """``x`` if ``value`` is ``x * x`` or ``x ** 2``."""
    node = producer(value, "Pow", "Mul")
    if node is None:
        return None
    if node.op_type == "Pow":
        return node.inputs[0] if is_scalar(node.inputs[1], 2.0) else None
    return node.inputs[0] if node.inputs[0] is node.inputs[1] else None


def mean(value: ir.Value) -> tuple[ir.Value, list[int]] | None:
    """``(x, axes)`` if ``value`` is a mean over trailing axes with the axes kept.

    ``axes`` are negative, in order: ``[-1]`` or ``[-2, -1]``, …
    """
    node = producer(value, "ReduceMean")
    if node is None or not attribute(node, "keepdims", 1) or len(node.inputs) < 2:
        return None
    source, axes = node.inputs[0], ints(node.inputs[1])
    size = rank(source)
    if source is None or not axes or size is None:
        return None
    trailing = sorted(a - size if a >= 0 else a for a in axes)
    return (source, trailing) if trailing == list(range(-len(trailing), 0)) else None


def per_channel(value: ir.Value | None, extents: list[int]) -> bool:
    """True for a constant of exactly the normalized axes' shape (a norm's weight or bias)."""
    if value is None or not is_constant(value) or value.const_value is None:
        return False
    return list(value.const_value.shape) == extents


def scaled(value: ir.Value) -> tuple[ir.Value, float]:
    """``(x, factor)`` with ``value = x * factor``; factor 1 where nothing multiplies."""
    factor = 1.0
    while (node := producer(value, "Mul", "Div")) is not None:
        step = _factor(node)
        if step is None:
            break
        value, factor = step[0], factor * step[1]
    return value, factor


def _factor(node: ir.Node) -> tuple[ir.Value, float] | None:
    orders = list(operand_orders(node)) if node.op_type == "Mul" else [tuple(node.inputs)]
    for source, other in orders:
        number = scalar(other)
        if source is None or number is None or (rank(other) or 0) > (rank(source) or 0):
            continue
        if node.op_type == "Mul":
            return source, number
        if number != 0 and math.isfinite(number):
            return source, 1.0 / number
    return None
