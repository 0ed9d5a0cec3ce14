"""Convolutions with packed weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hal.kernels import convolution as kernels
from hal.kernels import winograd
from hal.kernels.arrange import arrange
from hal.kernels.convolution_plan import Plan
from hal.kernels.winograd import Tiles
from hal.targets.tvm.converters.shape import reshaped
from hal.targets.tvm.dims import Dim
from hal.targets.tvm.fuse_convolutions import CONVOLUTION, plan_of
from hal.targets.tvm.lowering import Op, Operand


def convolution(op: Op) -> Operand:
    """``hal.tvm::Convolution(x, packed, bias[, residual])`` in float32."""
    made, x, residual = plan_of(op.node, op.context.shaping), op.input(0), op.optional(3)
    g = made.geometry
    shape = [x.shape[0], g.outputs, g.out[0] * g.out[1]]
    others = [] if residual is None else [reshaped(op, residual, shape)]
    follows: dict[str, Any] = {
        "residual": residual is not None,
        "low": op.attribute("low"),
        "high": op.attribute("high"),
    }
    if isinstance(made, Tiles):
        result = _in_tiles(op, made, shape, others, follows)
    else:
        result = _plainly(op, made, shape, others, follows)
    return reshaped(op, result, [x.shape[0], g.outputs, *g.out[4 - x.rank :]])


def _plainly(
    op: Op, made: Plan, shape: Sequence[Dim], others: list[Operand], follows: dict[str, Any]
) -> Operand:
    cores = op.context.shaping.cores
    code = kernels.convolution(made, cores, kernels.Floats(**follows))
    if made.alone:
        g, batch = made.geometry, shape[0]
        maps = reshaped(op, op.input(0), [batch, g.channels, *g.size])
        room = [batch * kernels.tasks(made, cores), 1, made.arranged.extent]
        operands = [maps, op.input(1), op.input(2), *others]
        outputs = [(shape, "float32"), (room, "float32")]
        return op.context.call_kernel(code, operands, outputs, "convolution")[0]
    return _call(op, code, [_arranged(op, made), op.input(1), op.input(2), *others], shape)


def _in_tiles(
    op: Op, made: Tiles, shape: Sequence[Dim], others: list[Operand], follows: dict[str, Any]
) -> Operand:
    batch, inner = shape[0], made.products.geometry
    z = _arranged(op, made.arranged)
    v = _call(op, winograd.scatter(made), [z], [batch, inner.channels, made.count], "scatter")
    terms = kernels.Floats(bias=False)
    code = kernels.convolution(made.products, op.context.shaping.cores, terms)
    u = _call(op, code, [v, op.input(1)], [batch, inner.outputs, made.count])
    return _call(op, winograd.gather(made, **follows), [u, op.input(2), *others], shape, "gather")


def _call(
    op: Op, code: Any, operands: list[Operand], shape: Sequence[Dim], name: str = "convolution"
) -> Operand:
    return op.context.call_kernel(code, operands, [(shape, "float32")], name)[0]


def _arranged(op: Op, made: Plan) -> Operand:
    """The input as the kernel reads it; convolutions of one input and window share it."""
    x, context, g = op.input(0), op.context, made.geometry
    flat = [x.shape[0], g.channels, made.arranged.extent]
    if made.arranged.as_given:
        return reshaped(op, x, flat)
    key = (op.node.inputs[0], made.arranged, g.pads)
    if key not in context.prepared:
        maps = reshaped(op, x, [x.shape[0], g.channels, *g.size])
        context.prepared[key] = [_call(op, arrange(made), [maps], flat, "arrange")]
    return context.prepared[key][0]


CONVERTERS: dict[str, Callable[[Op], Any]] = {CONVOLUTION: convolution}
"""Converters of the backend's own ops by op type."""
