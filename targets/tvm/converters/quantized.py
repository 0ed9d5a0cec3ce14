"""Products with packed quantized weights, and rows of quantized tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from tvm import tirx

from hal.kernels.prepare_activations import prepare
from hal.kernels.quantized_layout import Layout
from hal.kernels.quantized_matmul import matmul as kernel
from hal.targets.tvm.converters.index import wrapped
from hal.targets.tvm.converters.shape import reshaped
from hal.targets.tvm.dims import product
from hal.targets.tvm.fuse_quantized import GATHER, MATMUL
from hal.targets.tvm.lowering import Op, Operand

_FLAGS = ("zeros", "integer", "signed", "floats")


def _layout(op: Op) -> Layout:
    fields = {f.name: op.attribute(f.name) for f in dataclasses.fields(Layout)}
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


CONVERTERS: dict[str, Callable[[Op], Any]] = {MATMUL: matmul, GATHER: gather}
"""Converters of the backend's own ops by op type."""
