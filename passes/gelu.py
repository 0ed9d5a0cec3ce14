"""Fusion to ``Gelu``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import ClassVar

import onnx_ir as ir

from hal.ir import Graph
from hal.passes._edit import Editor, Rule, apply_rules, is_scalar, operand_orders, producer
from hal.passes._forms import scaled
from hal.passes.base import Outcome, Pass


@dataclasses.dataclass(frozen=True)
class FuseGelu(Pass):
    """Fuse both forms of the Gaussian error linear unit into ``Gelu``.

    ``x * 0.5 * (1 + erf(x / sqrt(2)))`` and its tanh approximation, in any order of factors.
    Preserves results up to rounding.
    """

    name: ClassVar[str] = "gelu"

    def run(self, graph: Graph) -> Outcome:
        """Apply :data:`RULES`."""
        counts = apply_rules(graph, RULES)
        return Outcome(sum(counts.values()), counts)


def _gelu(edit: Editor, node: ir.Node) -> bool:
    """``node`` is the last product of ``0.5``, ``x`` and ``1 + gate``."""
    for factors, constant in _readings(node.outputs[0], opens=2):
        if len(factors) != 2 or not math.isclose(constant, 0.5, rel_tol=1e-6):
            continue
        for x, sum_ in (factors, factors[::-1]):
            approximate = _approximation(_one_plus(sum_), x)
            if approximate is not None:
                out = node.outputs[0]
                attributes = {"approximate": approximate}
                return edit.replace(out, edit.op("Gelu", [x], attributes, like=out))
    return False


def _approximation(gate: ir.Value | None, x: ir.Value) -> str | None:
    if gate is None:
        return None
    if _is_erf_of(gate, x):
        return "none"
    return "tanh" if _is_tanh_of(gate, x) else None


def _readings(value: ir.Value, opens: int) -> Iterator[tuple[list[ir.Value], float]]:
    """Ways to read ``value`` as a product: its factors and the constant among them.

    A factor that is itself a product is read both as one factor and as its parts.
    """
    base, constant = scaled(value)
    yield [base], constant
    inner = producer(base, "Mul")
    if inner is None or not opens or inner.inputs[0] is None or inner.inputs[1] is None:
        return
    for first, first_constant in _readings(inner.inputs[0], opens - 1):
        for second, second_constant in _readings(inner.inputs[1], opens - 1):
            yield first + second, constant * first_constant * second_constant


def _one_plus(value: ir.Value) -> ir.Value | None:
    node = producer(value, "Add")
    if node is None:
        return None
    for source, other in operand_orders(node):
        if is_scalar(other, 1.0):
            return source
    return None


def _is_erf_of(gate: ir.Value, x: ir.Value) -> bool:
    erf = producer(gate, "Erf")
    if erf is None or erf.inputs[0] is None:
        return False
    source, factor = scaled(erf.inputs[0])
    return source is x and math.isclose(factor, 1 / math.sqrt(2), rel_tol=1e-4)


def _is_tanh_of(gate: ir.Value, x: ir.Value) -> bool:
    """``tanh(sqrt(2/pi) * (x + 0.044715 * x**3))``, or with ``x`` taken out of the sum."""
    tanh = producer(gate, "Tanh")
    if tanh is None or tanh.inputs[0] is None:
        return False
    inner, factor = scaled(tanh.inputs[0])
    if not math.isclose(factor, math.sqrt(2 / math.pi), rel_tol=1e-4):
        return False
    total = producer(inner, "Add")
    if total is not None:
        return any(a is x and _is_cubic(b, x) for a, b in operand_orders(total))
    product = producer(inner, "Mul")
    if product is None:
        return False
    for a, b in operand_orders(product):
        rest = _one_plus(b)
        if a is x and rest is not None:
            squared, weight = scaled(rest)
            if _power(squared, x, 2) and math.isclose(weight, 0.044715, rel_tol=1e-4):
                return True
    return False


def _is_cubic(value: ir.Value, x: ir.Value) -> bool:
    source, weight = scaled(value)
    return math.isclose(weight, 0.044715, rel_tol=1e-4) and _power(source, x, 3)


def _power(value: ir.Value, x: ir.Value, exponent: int) -> bool:
    if exponent == 1:
        return value is x
    node = producer(value, "Pow", "Mul")
    if node is None:
        return False
    if node.op_type == "Pow":
        return node.inputs[0] is x and is_scalar(node.inputs[1], float(exponent))
    return any(a is x and _power(b, x, exponent - 1) for a, b in operand_orders(node))


RULES: tuple[Rule, ...] = (Rule("gelu", ("Mul", "Div"), _gelu),)
