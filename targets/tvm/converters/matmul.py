"""Matrix products: ``MatMul``, ``Gemm``, integer products, ``Einsum``, ``Det``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
from tvm import te, tirx

from hal.kernels import batched_matmul as batched_kernels
from hal.kernels import matmul as kernels
from hal.kernels.vectors import vector_lanes
from hal.targets.tvm.converters.elementwise import broadcast_index, elementwise
from hal.targets.tvm.converters.shape import reshaped, transposed
from hal.targets.tvm.dims import Dim, Refused, product
from hal.targets.tvm.dtypes import FLOATS, NUMBERS
from hal.targets.tvm.lowering import Op, Operand

_FEWEST_LANES = 4
"""Products whose columns divide into no vectors of that many are left to the compiler."""

_BYTES = frozenset({ir.DataType.INT8, ir.DataType.UINT8})


def accumulator(stored: str) -> str:
    """Dtype in which products of ``stored`` are summed."""
    return "float32" if stored in ("float16", "bfloat16") else stored


def matrix_product(op: Op, a: Operand, b: Operand) -> Operand:
    """``a @ b`` as NumPy does it, for ranks of 1 and up."""
    if a.rank == 0 or b.rank == 0:
        raise Refused("MatMul of a scalar")
    left = reshaped(op, a, [1, *a.shape]) if a.rank == 1 else a
    right = reshaped(op, b, [*b.shape, 1]) if b.rank == 1 else b
    result = (
        _with_weights(op, left, right) or _per_head(op, left, right) or _batched(op, left, right)
    )
    dims = list(result.shape)
    if a.rank == 1:
        del dims[-2]
    if b.rank == 1:
        del dims[-1]
    return reshaped(op, result, dims)


def _with_weights(op: Op, a: Operand, b: Operand) -> Operand | None:
    """The blocked kernel for a rank-2 float32 ``b`` of static shape, where it fits."""
    k, n = b.shape[-2], b.shape[-1]
    if op.context.shaping.plain or b.rank != 2 or a.stored != "float32" or b.stored != "float32":
        return None
    if not (isinstance(k, int) and isinstance(n, int)) or k * n < 1024:
        return None
    shaping = op.context.shaping
    lanes = vector_lanes(n, shaping.lanes)
    kernel = kernels.row_major(k, n, lanes, shaping.registers, shaping.cores)
    if kernel is None or lanes < _FEWEST_LANES:
        return None
    rows = op.symbols.simplify(product(a.shape[:-1]))
    flat = reshaped(op, a, [rows, k])
    result = op.context.call_kernel(kernel, [flat, b], [([rows, n], "float32")], "matmul")[0]
    return reshaped(op, result, [*a.shape[:-1], n])


def _per_head(op: Op, a: Operand, b: Operand) -> Operand | None:
    """The blocked kernel for a matrix of static shape for each head of ``[batch, heads, m, k]``."""
    if a.rank != 4 or b.rank != 3 or a.stored != "float32" or b.stored != "float32":
        return None
    if op.context.shaping.plain:
        return None
    if not all(isinstance(d, int) for d in b.shape) or a.shape[1] != b.shape[0]:
        return None
    heads, k, n = b.shape
    kernel = batched_kernels.per_head(heads, k, n, op.context.shaping.lanes)
    shape = [*a.shape[:3], n]
    return op.context.call_kernel(kernel, [a, b], [(shape, "float32")], "matmul_per_head")[0]


def _batched(op: Op, a: Operand, b: Operand) -> Operand:
    """The general product, batch dims broadcast."""
    batch = op.symbols.broadcast([a.shape[:-2], b.shape[:-2]])
    wide = accumulator(a.stored)
    shape = [*batch, a.shape[-2], b.shape[-1]]

    def kernel(x: Any, y: Any) -> Any:
        k = te.reduce_axis((0, x.shape[-1]), name="k")

        def element(*i: Any) -> Any:
            left = _batch_element(op, x, i[:-2], a.shape, batch, (i[-2], k))
            right = _batch_element(op, y, i[:-2], b.shape, batch, (k, i[-1]))
            return te.sum(left.astype(wide) * right.astype(wide), axis=k)

        product_ = te.compute([_const(d) for d in shape], element, name="matmul")
        if wide == a.stored:
            return product_
        return te.compute(product_.shape, lambda *i: product_(*i).astype(a.stored), name="narrow")

    return op.te(kernel, a, b, dtype=a.dtype)


def _batch_element(
    op: Op, tensor: Any, batch_indices: Any, shape: Sequence[Dim], batch: Sequence[Dim], last: Any
) -> Any:
    own = shape[:-2]
    offset = len(batch) - len(own)
    aligned = [
        batch[offset + i] if op.symbols.equal(d, batch[offset + i]) else d
        for i, d in enumerate(own)
    ]

    def pick(*indices: Any) -> Any:
        return tensor(*indices, *last)

    return broadcast_index(pick, batch_indices, aligned, batch)


def _const(dim: Dim) -> Any:
    return tirx.const(dim, "int64") if isinstance(dim, int) else dim


_FACTORS = NUMBERS - {ir.DataType.BFLOAT16}
"""Not bfloat16: TVM 0.27 drops the rounding between fused bfloat16 ops."""


def matmul(op: Op) -> Operand:
    """``MatMul``."""
    return matrix_product(op, op.require(0, _FACTORS), op.require(1, _FACTORS))


def gemm(op: Op) -> Operand:
    """``Gemm``: ``alpha * A' @ B' + beta * C``."""
    a, b = op.require(0, _FACTORS), op.require(1, _FACTORS)
    alpha, beta = op.attribute("alpha", 1.0), op.attribute("beta", 1.0)
    if op.attribute("transA", 0):
        a = transposed(op, a, [1, 0])
    if op.attribute("transB", 0):
        b = transposed(op, b, [1, 0])
    result = matrix_product(op, a, b)
    c = op.optional(2)
    if c is None and alpha == 1.0:
        return result

    def body(v: Any, *rest: Any) -> Any:
        v = v if alpha == 1.0 else v * tirx.const(alpha, a.stored)
        if rest:
            term = rest[0] if beta == 1.0 else rest[0] * tirx.const(beta, a.stored)
            v = v + term
        return v

    return elementwise(op, body, [result] + ([c] if c is not None else []), a.dtype)


def _centered(op: Op, x: Operand, zero: Operand | None, rows: bool) -> Operand:
    """An 8-bit operand as int32 minus its zero point (per row or per column when a vector)."""
    if zero is None:
        return elementwise(op, lambda v: v.astype("int32"), [x], ir.DataType.INT32)
    if zero.rank == 1 and zero.shape[0] != 1 and rows:
        zero = reshaped(op, zero, [*zero.shape, 1])
    elif zero.rank == 1 and zero.shape[0] == 1:
        zero = op.context.emit_scalar(zero)
    return elementwise(
        op, lambda v, z: v.astype("int32") - z.astype("int32"), [x, zero], ir.DataType.INT32
    )


def matmul_integer(op: Op) -> Operand:
    """``MatMulInteger``: int32 product of 8-bit operands."""
    a, b = op.require(0, _BYTES), op.require(1, _BYTES)
    left = _centered(op, a, op.optional(2), rows=True)
    right = _centered(op, b, op.optional(3), rows=False)
    return matrix_product(op, left, right)


def qlinear_matmul(op: Op) -> Operand:
    """``QLinearMatMul``: product of quantized operands, quantized again."""
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = op.inputs()
    if a.dtype not in _BYTES or b.dtype not in _BYTES or y_zero.dtype not in _BYTES:
        raise Refused("QLinearMatMul on other dtypes than int8 and uint8")
    if a_scale.dtype not in FLOATS:
        raise Refused(f"QLinearMatMul with scales of {a_scale.dtype.name}")
    left = _centered(op, a, a_zero, rows=True)
    right = _centered(op, b, b_zero, rows=False)
    product_ = matrix_product(op, left, right)
    if a_scale.rank == 1 and a_scale.shape[0] != 1:
        a_scale = reshaped(op, a_scale, [*a_scale.shape, 1])
    return requantize(op, product_, [a_scale, b_scale], y_scale, y_zero)


def requantize(
    op: Op, product_: Operand, scales: Sequence[Operand], y_scale: Operand, y_zero: Operand
) -> Operand:
    """``round(product * scales / y_scale) + y_zero``, saturated to the dtype of ``y_zero``."""
    low, high = (0, 255) if y_zero.dtype is ir.DataType.UINT8 else (-128, 127)
    operands = [product_, *(flatten_scalar(op, s) for s in (*scales, y_scale, y_zero))]

    def body(v: Any, *rest: Any) -> Any:
        *factors, out_scale, zero = rest
        ratio = factors[0].astype("float32")
        for factor in factors[1:]:
            ratio = ratio * factor.astype("float32")
        value = v.astype("float32") * (ratio / out_scale.astype("float32"))
        rounded = tirx.nearbyint(value) + zero.astype("float32")
        limited = tirx.max(
            tirx.min(rounded, tirx.const(float(high), "float32")), tirx.const(float(low), "float32")
        )
        return limited.astype("int32").astype(y_zero.stored)

    return elementwise(op, body, operands, y_zero.dtype)


def flatten_scalar(op: Op, x: Operand) -> Operand:
    """A vector of one element as a scalar; others unchanged."""
    return op.context.emit_scalar(x) if x.rank == 1 and x.shape[0] == 1 else x


def einsum(op: Op) -> Operand:
    """``Einsum`` of any number of operands."""
    operands = op.inputs()
    equation = str(op.attribute("equation")).replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if not arrow:
        letters = [c for c in left if c.isalpha()]
        right = "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
        right = ("..." if "..." in left else "") + right
    spelled = [_letters(t, o.rank) for t, o in zip(terms, operands, strict=True)]
    width = max((sum(1 for c in s if c.isdigit()) for s in spelled), default=0)
    out = [str(i) for i in range(width)][::-1] if "..." in right else []
    at = right.find("...")
    names = list(right.replace("...", ""))
    result = names if at < 0 else names[:at] + out + names[at:]
    extents: dict[str, Dim] = {}
    for letters, operand in zip(spelled, operands, strict=True):
        for letter, dim in zip(letters, operand.shape, strict=True):
            known = extents.get(letter)
            extents[letter] = dim if known is None or known == 1 else known
    summed = [letter for letter in extents if letter not in result]
    wide = accumulator(operands[0].stored)

    def kernel(*tensors: Any) -> Any:
        axes = {s: te.reduce_axis((0, _const(extents[s])), name=f"r{s}") for s in summed}

        def element(*indices: Any) -> Any:
            at = {**dict(zip(result, indices, strict=True)), **axes}
            value: Any = None
            for tensor, letters, operand in zip(tensors, spelled, operands, strict=True):
                picked = [
                    tirx.const(0, "int64") if d == 1 and extents[s] != 1 else at[s]
                    for s, d in zip(letters, operand.shape, strict=True)
                ]
                item = tensor(*picked).astype(wide)
                value = item if value is None else value * item
            return te.sum(value, axis=list(axes.values())) if axes else value

        total = te.compute([_const(extents[s]) for s in result], element, name="einsum")
        if wide == operands[0].stored:
            return total
        return te.compute(total.shape, lambda *i: total(*i).astype(operands[0].stored))

    return op.te(kernel, *operands, dtype=operands[0].dtype)


def _letters(term: str, rank: int) -> list[str]:
    """One name per axis; axes of an ellipsis are numbered from the last."""
    at = term.find("...")
    names = list(term.replace("...", ""))
    if at < 0:
        return names
    hidden = [str(i) for i in range(rank - len(names))][::-1]
    return names[:at] + hidden + names[at:]


def det(op: Op) -> Operand:
    """``Det`` of square matrices up to 4 x 4, by expansion along the first row."""
    x = op.require(0, FLOATS)
    size = x.shape[-1]
    if not isinstance(size, int) or size > 4:
        raise Refused("Det of matrices beyond 4 x 4")

    def body(tensor: Any, indices: Any) -> Any:
        def minor(row: int, columns: list[int]) -> Any:
            if len(columns) == 1:
                return tensor(*indices, row, columns[0])
            total: Any = None
            for position, column in enumerate(columns):
                rest = [c for c in columns if c != column]
                term = tensor(*indices, row, column) * minor(row + 1, rest)
                if total is None:
                    total = term
                else:
                    total = total + term if position % 2 == 0 else total - term
            return total

        return minor(0, list(range(size)))

    return op.compute(x.shape[:-2], body, x, dtype=x.dtype)


CONVERTERS: dict[str, Callable[[Op], Any]] = {
    "MatMul": matmul,
    "Gemm": gemm,
    "MatMulInteger": matmul_integer,
    "QLinearMatMul": qlinear_matmul,
    "Einsum": einsum,
    "Det": det,
}
"""Converters of this family by op type."""
