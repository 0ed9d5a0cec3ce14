"""Convolutions with packed weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
from tvm import tirx

from hal.kernels import codes_convolution as codes
from hal.kernels import convolution as kernels
from hal.kernels import winograd
from hal.kernels.arrange import arrange
from hal.kernels.convolution_plan import Plan
from hal.kernels.winograd import Tiles
from hal.targets.tvm import fuse_codes
from hal.targets.tvm.converters.shape import reshaped
from hal.targets.tvm.dims import Dim, product
from hal.targets.tvm.fuse_convolutions import plan_of
from hal.targets.tvm.lowering import Op, Operand
from hal.targets.tvm.own_ops import CONVOLUTION

_FLOATS = kernels.Floats()


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


def codes_convolution(op: Op) -> Operand:
    """``hal.tvm::CodesConvolution(words, packed, start, factor, bias[, residual])``."""
    node, shaping = op.node, op.context.shaping
    made, dot = fuse_codes.plan_of(node, shaping), shaping.dot
    x = fuse_codes.rounding(node, "x")
    assert dot is not None
    assert x is not None
    kind = codes.SeparateCodes if made.geometry.groups > 1 else codes.Codes
    out, middle, residual = (fuse_codes.rounding(node, n) for n in ("out", "middle", "residual"))
    limits = op.attribute("low"), op.attribute("high")
    terms = kind(dot, x, out, middle, residual, *limits)
    g, batch, others = made.geometry, op.input(0).shape[0], []
    if terms.residual:
        pixels = g.out[0] * g.out[1]
        others = [reshaped(op, op.input(5), [batch, g.outputs // codes.PER_WORD, pixels])]
    operands = [*(op.input(i) for i in range(1, 5)), *others]
    shape = [batch, *terms.parameters(made, batch)["out"][0][1:]]
    result = _of_codes(op, made, terms, operands, (shape, "int32" if terms.out else "float32"))
    if terms.out:
        return result
    outputs = fuse_codes.geometry(node).outputs
    if outputs != g.outputs:
        result = op.compute([batch, outputs, shape[2]], lambda v, i: v(*i), result)
    rank = len(node.outputs[0].shape or ())
    return reshaped(op, result, [batch, outputs, *g.out[4 - rank :]])


def codes_largest(op: Op) -> Operand:
    """``hal.tvm::CodesLargest(words)``."""
    shaping, sizes, batch = op.context.shaping, fuse_codes.geometry(op.node), op.input(0).shape[0]
    dot = shaping.dot
    assert dot is not None
    made = codes.largest_plan(sizes, dot, shaping.registers)
    assert made is not None
    g = made.geometry
    shape = [batch, g.outputs, g.out[0] * g.out[1]]
    return _of_codes(op, made, codes.Largest(dot), [], (shape, "int32"))


def _of_codes(
    op: Op, made: Plan, terms: kernels.Terms, operands: list[Operand], out: tuple[list[Dim], str]
) -> Operand:
    """The kernel's result; the input is arranged before, or by each task for itself."""
    cores, g, words = op.context.shaping.cores, made.geometry, op.input(0)
    code, outputs = kernels.convolution(made, cores, terms), [out]
    if made.alone:
        z = reshaped(op, words, [words.shape[0], g.channels, *g.size])
        room = [words.shape[0] * kernels.tasks(made, cores), terms.planes, made.arranged.extent]
        outputs.append((room, terms.dtype))
    else:
        z = _arranged(op, made, terms)
    return op.context.call_kernel(code, [z, *operands], outputs, "codes")[0]


def pack_codes(op: Op) -> Operand:
    """``hal.tvm::PackCodes(codes)``: four channels to a word."""
    x, flip = op.input(0), _flip(op)
    channels, pixels = x.shape[1], product(x.shape[2:])
    flat = reshaped(op, x, [x.shape[0], channels, pixels])

    def word(v: Any, i: Any) -> Any:
        total = tirx.const(0, "int32")
        for k in range(codes.PER_WORD):
            channel = i[1] * codes.PER_WORD + k
            there = channel < channels
            at = tirx.if_then_else(there, channel, 0) if channels % codes.PER_WORD else channel
            byte = v(i[0], at, i[2]).astype("int32") & tirx.const(codes.MOST, "int32")
            byte = byte ^ tirx.const(flip, "int32")
            total = total | tirx.shift_left(byte, tirx.const(8 * k, "int32"))
        return total

    shape = [x.shape[0], -(-channels // codes.PER_WORD), pixels]
    return op.compute(shape, word, flat, dtype=ir.DataType.INT32)


def unpack_codes(op: Op) -> Operand:
    """``hal.tvm::UnpackCodes(words)``: codes as ONNX has them."""
    words, flip = op.input(0), _flip(op)
    kind = ir.DataType.INT8 if op.attribute("signed") else ir.DataType.UINT8
    sizes = list(op.attribute("shape"))
    shape = [words.shape[0], sizes[0], product(sizes[1:])]

    def code(v: Any, i: Any) -> Any:
        shift = (tirx.floormod(i[1], codes.PER_WORD) * 8).astype("int32")
        word = v(i[0], tirx.floordiv(i[1], codes.PER_WORD), i[2])
        byte = tirx.shift_right(word, shift) & tirx.const(codes.MOST, "int32")
        return (byte ^ tirx.const(flip, "int32")).astype(kind.name.lower())

    flat = op.compute(shape, code, words, dtype=kind)
    return reshaped(op, flat, [words.shape[0], *sizes])


def _flip(op: Op) -> int:
    """What of a byte changes between codes and words."""
    dot = op.context.shaping.dot
    assert dot is not None
    return 0x80 if bool(op.attribute("signed")) != dot.signed else 0


def _call(
    op: Op, code: Any, operands: list[Operand], shape: Sequence[Dim], name: str = "convolution"
) -> Operand:
    return op.context.call_kernel(code, operands, [(shape, "float32")], name)[0]


def _arranged(op: Op, made: Plan, terms: kernels.Terms = _FLOATS) -> Operand:
    """The input as the kernel reads it; convolutions of one input and window share it."""
    x, context, g = op.input(0), op.context, made.geometry
    flat = [x.shape[0], g.channels, made.arranged.extent]
    if made.arranged.as_given:
        return reshaped(op, x, flat)
    key = (op.node.inputs[0], made.arranged, g.pads, terms.border)
    if key not in context.prepared:
        maps = reshaped(op, x, [x.shape[0], g.channels, *g.size])
        code = arrange(made, terms.dtype, terms.border)
        context.prepared[key] = context.call_kernel(code, [maps], [(flat, terms.dtype)], "arrange")
    return context.prepared[key][0]


CONVERTERS: dict[str, Callable[[Op], Any]] = {
    CONVOLUTION: convolution,
    fuse_codes.CONVOLUTION: codes_convolution,
    fuse_codes.LARGEST: codes_largest,
    fuse_codes.PACK: pack_codes,
    fuse_codes.UNPACK: unpack_codes,
}
"""Converters of the backend's own ops by op type."""
