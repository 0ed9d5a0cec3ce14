"""Products with packed quantized weights, and rows of quantized tables."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from tvm import tirx

from hal.kernels import moe
from hal.kernels.expert_products import expert_products
from hal.kernels.head_products import head_products
from hal.kernels.prepare_activations import prepare
from hal.kernels.quantized_layout import Layout
from hal.kernels.quantized_matmul import matmul as kernel
from hal.targets.tvm.converters.index import wrapped
from hal.targets.tvm.converters.shape import reshaped
from hal.targets.tvm.dims import Refused, product
from hal.targets.tvm.fuse_quantized import EXPERTS, GATHER, HEADS, MATMUL
from hal.targets.tvm.lowering import Op, Operand

_FLOAT = frozenset({ir.DataType.FLOAT})
_FLAGS = ("zeros", "integer", "signed", "floats")


def _layout(op: Op, prefix: str = "") -> Layout:
    fields = {f.name: op.attribute(prefix + f.name) for f in dataclasses.fields(Layout)}
    return Layout(**{n: bool(v) if n in _FLAGS else v for n, v in fields.items()})


def matmul(op: Op) -> Operand:
    """``hal.tvm::QuantizedMatMul(x, packed)``: ``x @ wᵀ`` in float32."""
    x, packed, layout = op.input(0), op.input(1), _layout(op)
    rows = op.symbols.simplify(product(x.shape[:-1]))
    prepared = _prepared(op, x, layout, rows)
    shaping = op.context.shaping
    code = kernel(layout, shaping.registers, shaping.dot if layout.integer else None)
    outputs = [([rows, layout.padded_n], "float32")]
    (result,) = op.context.call_kernel(code, [packed, *prepared], outputs, "quantized_matmul")
    if layout.padded_n != layout.n:
        result = op.compute([rows, layout.n], lambda v, i: v(*i), result)
    return reshaped(op, result, [*x.shape[:-1], layout.n])


def head_matmul(op: Op) -> Operand:
    """``hal.tvm::QuantizedHeadMatMul(x [.., heads, M, k], packed)``: each head's rows times its."""
    x, packed, layout = op.input(0), op.input(1), _layout(op)
    heads, shaping = op.attribute("heads"), op.context.shaping
    rows = op.symbols.simplify(product(x.shape[:-1]))
    prepared = _prepared(op, x, layout, rows)
    batch = op.symbols.simplify(product(x.shape[:-3]))
    whole = reshaped(op, x, [batch, heads, x.shape[-2], layout.k])
    code = head_products(layout, heads, shaping.registers, shaping.dot if layout.integer else None)
    outputs = [([rows, layout.padded_n], "float32")]
    operands = [packed, whole, *prepared]
    (result,) = op.context.call_kernel(code, operands, outputs, "head_products")
    if layout.padded_n != layout.n:
        result = op.compute([rows, layout.n], lambda v, i: v(*i), result)
    return reshaped(op, result, [*x.shape[:-1], layout.n])


def _prepared(op: Op, x: Operand, layout: Layout, rows: Any) -> list[Operand]:
    """Activations as the kernel reads them; products of the same tensor share them."""
    block, bits = op.attribute("block", 0), op.attribute("round_bits", 8)
    # What does not change the activations' form must not keep products from sharing them.
    form = dataclasses.replace(layout, n=1, tiles=1)
    if layout.integer:
        form = dataclasses.replace(form, signed=layout.signed and layout.bits == 8)
    key = (op.node.inputs[0], form, block, bits)
    if key not in op.context.prepared:
        flat = reshaped(op, x, [rows, layout.k])
        name = "int8" if layout.integer else "float32"
        outputs = [([rows, layout.padded_k], name), ([rows, layout.groups], "float32")]
        if layout.integer:
            outputs.append(([rows, layout.groups], "int32"))
        code = prepare(form, block, bits)
        op.context.prepared[key] = op.context.call_kernel(
            code, [flat], outputs, "prepare_activations"
        )
    return op.context.prepared[key]


def mixture_of_experts(op: Op) -> Operand:
    """``hal.tvm::QuantizedMixtureOfExperts(x, index, weight, gate_up, down)`` in float32."""
    x, index, weight = op.require(0, _FLOAT), op.input(1), op.require(2, _FLOAT)
    up, down = _layout(op, "up_"), _layout(op, "down_")
    name = op.attribute("activation")
    if name not in moe.ACTIVATIONS:
        raise Refused(f"MixtureOfExperts with the activation {name!r}")
    act, inner, choices = moe.ACTIVATIONS[name], up.n // 2, index.shape[1]
    if not isinstance(choices, int):
        raise Refused("MixtureOfExperts with an unknown number of choices")
    tokens, rows = x.shape[0], op.symbols.simplify(x.shape[0] * choices)
    count = op.attribute("experts")

    def products(layout: Layout, packed: Operand, given: list[Operand], *, shared: bool) -> Operand:
        dot = op.context.shaping.dot if layout.integer else None
        code = expert_products(layout, count, choices, shared=shared, dot=dot)
        out = [([rows, layout.padded_n], "float32")]
        operands = [packed, index, *given]
        return op.context.call_kernel(code, operands, out, "expert_products")[0]

    both = products(up, op.input(3), _prepared(op, x, up, tokens), shared=True)
    h = op.compute([rows, inner], lambda v, i: act(v(i[0], i[1])) * v(i[0], i[1] + inner), both)
    outputs = [([rows, down.padded_k], "float32"), ([rows, down.groups], "float32")]
    values = op.context.call_kernel(prepare(down), [h], outputs, "prepare_activations")
    each = products(down, op.input(4), values, shared=False)

    def summed(chosen: Any, weights: Any, i: Any) -> Any:
        parts = [weights(i[0], k) * chosen(i[0] * choices + k, i[1]) for k in range(choices)]
        return functools.reduce(operator.add, parts)

    return op.compute([tokens, down.n], summed, each, weight)


def gather(op: Op) -> Operand:
    """``hal.tvm::QuantizedGather(ids, codes, scale, zero)``: rows of a table in float32."""
    ids, table, scale, zero = op.input(0), op.input(1), op.input(2), op.optional(3)
    k, bits, group = (op.attribute(name) for name in ("k", "bits", "group"))
    rows, half = table.shape[0], 1 << (bits - 1)

    def parameter(tensor: Any, operand: Operand, row: Any, column: Any) -> Any:
        if operand.rank == 2:
            return tensor(row, tirx.floordiv(column, group))
        return tensor(*([row if operand.shape[0] != 1 else 0] * operand.rank))

    def body(where: Any, codes: Any, scales: Any, *rest: Any) -> Any:
        *zeros, i = rest
        row, column = wrapped(where(*i[:-1]), rows), i[-1]
        code = _code(codes, row, column, k, bits)
        if op.attribute("floats", 0):
            code = _float(code, bits)
        elif op.attribute("signed") and bits == 3:
            code = code - half  # planes hold codes that were moved up, not two's complements
        elif op.attribute("signed"):
            code = tirx.bitwise_xor(code, tirx.const(half, "int32")) - half
        if zero is not None:
            code = code - parameter(zeros[0], zero, row, column).astype("int32")
        return code.astype("float32") * parameter(scales, scale, row, column).astype("float32")

    operands = [ids, table, scale, *([zero] if zero is not None else [])]
    return op.compute([*ids.shape, k], body, *operands)


def _float(code: Any, bits: int) -> Any:
    """The number that a float of 8 bits, or twice the one that a float of 4 bits is, as float32."""
    if bits == 8:
        moved = tirx.bitwise_and(tirx.shift_left(code, 24), tirx.const(-(1 << 31), "int32"))
        moved = tirx.bitwise_or(moved, tirx.shift_left(tirx.bitwise_and(code, 127), 20))
        return tirx.reinterpret("float32", moved) * tirx.const(2.0**120, "float32")
    size = tirx.bitwise_and(code, 7)
    size = tirx.max(size, tirx.max(2 * size - 4, 4 * size - 16))
    return tirx.Select(code >= 8, -size, size)


def _code(codes: Any, row: Any, column: Any, k: int, bits: int) -> Any:
    """The unsigned code at ``column`` of a row of bytes, as int32."""

    def field(first: int, width: int) -> Any:
        per_byte = 8 // width
        byte = codes(row, first + tirx.floordiv(column, per_byte)).astype("int32")
        shift = tirx.floormod(column, per_byte).astype("int32") * width
        return tirx.bitwise_and(tirx.shift_right(byte, shift), (1 << width) - 1)

    if bits == 3:
        return field(0, 2) + field(k // 4, 1) * 4
    return field(0, bits)


CONVERTERS: dict[str, Callable[[Op], Any]] = {
    MATMUL: matmul,
    GATHER: gather,
    EXPERTS: mixture_of_experts,
    HEADS: head_matmul,
}
"""Converters of the backend's own ops by op type."""
