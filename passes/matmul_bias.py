"""One form for linear layers."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from hal.ir import Graph
from hal.passes._edit import (
    Editor,
    Rule,
    apply_rules,
    attribute,
    ints,
    is_constant,
    producer,
    rank,
    same_extents,
    single_use,
)
from hal.passes.base import Outcome, Pass


@dataclasses.dataclass(frozen=True)
class CanonicalMatMul(Pass):
    """Bring linear layers to ``Add(MatMul(x, weight), bias)``.

    The weight is ``[in, out]``, the bias is the second operand. ``Gemm`` becomes that form, a
    transposition of the weight becoming a lazy constant; a ``MatMul`` on flattened rows is done on
    the rows as they are. Preserves results up to rounding.
    """

    name: ClassVar[str] = "matmul_bias"

    def run(self, graph: Graph) -> Outcome:
        """Apply :data:`RULES`."""
        counts = apply_rules(graph, RULES, rounds=3)
        return Outcome(sum(counts.values()), counts)


def _gemm(edit: Editor, node: ir.Node) -> bool:
    """``alpha * A' @ B' + beta * C``; factors and transpositions of constants fold later."""
    a, b = node.inputs[0], node.inputs[1]
    c = node.inputs[2] if len(node.inputs) > 2 else None
    out = node.outputs[0]
    if a is None or b is None or out.dtype is None or out.dtype.numpy().kind not in "f":
        return False
    a = _transposed(edit, a, attribute(node, "transA", 0))
    b = _transposed(edit, b, attribute(node, "transB", 0))
    product = edit.op("MatMul", [a, _times(edit, b, attribute(node, "alpha", 1.0))], like=out)
    if c is None:
        return edit.replace(out, product)
    bias = _times(edit, c, attribute(node, "beta", 1.0))
    return edit.replace(out, edit.op("Add", [product, bias], like=out))


def _transposed(edit: Editor, value: ir.Value, flag: int) -> ir.Value:
    if not flag:
        return value
    made = edit.op("Transpose", [value], {"perm": [1, 0]})
    made.type = value.type
    if value.shape is not None:
        made.shape = ir.Shape(list(reversed(list(value.shape))))
    return made


def _times(edit: Editor, value: ir.Value, factor: float) -> ir.Value:
    if factor == 1.0 or value.dtype is None:
        return value
    number = edit.constant(np.asarray(factor, dtype=value.dtype.numpy()), "factor")
    return edit.op("Mul", [value, number], like=value)


def _bias_second(_edit: Editor, node: ir.Node) -> bool:
    first, second = node.inputs[0], node.inputs[1]
    if first is None or not is_constant(first) or producer(second, "MatMul") is None:
        return False
    node.replace_input_with(0, second)
    node.replace_input_with(1, first)
    return True


def _unflattened(edit: Editor, node: ir.Node) -> bool:
    """``reshape(reshape(x, [-1, k]) @ w [+ b], [.., n])`` is ``x @ w [+ b]``."""
    out, value = node.outputs[0], node.inputs[0]
    add = producer(value, "Add")
    bias = add.inputs[1] if add is not None else None
    if add is not None and (not is_constant(bias) or rank(bias) != 1):
        return False
    product = producer(add.inputs[0] if add is not None else value, "MatMul")
    flatten = producer(product.inputs[0], "Reshape") if product is not None else None
    if product is None or flatten is None or not single_use(product.outputs[0]):
        return False
    x, target = flatten.inputs[0], ints(flatten.inputs[1])
    if add is not None and not single_use(add.outputs[0]):
        return False
    if x is None or x.shape is None or out.shape is None or target is None or len(target) != 2:
        return False
    rows_kept = len(x.shape) > 2 and same_extents(x.shape[:-1], out.shape[:-1])
    if not rows_kept or x.shape[-1] != target[1] or rank(product.inputs[1]) != 2:
        return False
    made = edit.op("MatMul", [x, product.inputs[1]], like=out)
    if add is not None:
        made = edit.op("Add", [made, bias], like=out)
    return edit.replace(out, made)


RULES: tuple[Rule, ...] = (
    Rule("gemm", ("Gemm",), _gemm),
    Rule("bias second", ("Add",), _bias_second),
    Rule("rows not flattened", ("Reshape",), _unflattened),
)
