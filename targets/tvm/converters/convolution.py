"""Convolutions with packed weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hal.kernels.convolution import arrange
from hal.kernels.convolution import convolution as kernel
from hal.targets.tvm.converters.shape import reshaped
from hal.targets.tvm.fuse_convolutions import CONVOLUTION, plan_of
from hal.targets.tvm.lowering import Op, Operand


def convolution(op: Op) -> Operand:
    """``hal.tvm::Convolution(x, packed, bias[, residual])`` in float32."""
    context, made = op.context, plan_of(op.node, op.context.shaping)
    x, weights, bias, residual = op.input(0), op.input(1), op.input(2), op.optional(3)
    batch, g = x.shape[0], made.geometry
    flat = [batch, g.channels, made.arranged.extent]
    if made.arranged.as_given:
        z = reshaped(op, x, flat)
    else:
        # Convolutions of one input with the same window share what was arranged.
        key = (op.node.inputs[0], made.arranged, g.pads)
        if key not in context.prepared:
            maps = reshaped(op, x, [batch, g.channels, *g.size])
            outputs = [(flat, "float32")]
            context.prepared[key] = context.call_kernel(arrange(made), [maps], outputs, "arrange")
        (z,) = context.prepared[key]
    shape = [batch, g.outputs, g.out[0] * g.out[1]]
    others = [] if residual is None else [reshaped(op, residual, shape)]
    code = kernel(
        made,
        context.shaping.cores,
        residual=residual is not None,
        low=op.attribute("low"),
        high=op.attribute("high"),
    )
    operands = [z, weights, bias, *others]
    (result,) = context.call_kernel(code, operands, [(shape, "float32")], "convolution")
    return reshaped(op, result, [batch, g.outputs, *g.out[4 - x.rank :]])


CONVERTERS: dict[str, Callable[[Op], Any]] = {CONVOLUTION: convolution}
"""Converters of the backend's own ops by op type."""
