from __future__ import annotations

import math

import pytest

from hal.passes import FuseGelu
from tests.passes.toys import Toy, ops, same


def erf_gate(t: Toy, x):
    return t("Add", t("Erf", t("Div", x, math.sqrt(2))), 1.0)


def tanh_gate(t: Toy, x, cube: str):
    third = t("Pow", x, 3.0) if cube == "pow" else t("Mul", t("Mul", x, x), x)
    inner = t("Mul", t("Add", x, t("Mul", third, 0.044715)), math.sqrt(2 / math.pi))
    return t("Add", 1.0, t("Tanh", inner))


def products(t: Toy, x, gate, order: int):
    if order == 0:
        return t("Mul", t("Mul", x, gate), 0.5)
    if order == 1:
        return t("Mul", t("Mul", 0.5, x), gate)
    return t("Mul", x, t("Mul", gate, 0.5))


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("form", ["erf", "pow", "mul"])
def test_both_forms_in_any_order_become_gelu(order: int, form: str):
    t = Toy(x=["b", 8])
    x = t("Mul", t.x, t.x)  # a product itself: it must not be taken apart
    gate = erf_gate(t, x) if form == "erf" else tanh_gate(t, x, form)
    t.output(products(t, x, gate, order))
    result = same(t.graph(), FuseGelu(), b=3)
    assert ops(result) == {"Mul": 1, "Gelu": 1}
    (gelu,) = (n for n in result.nodes() if n.op_type == "Gelu")
    assert gelu.attributes["approximate"].value == ("none" if form == "erf" else "tanh")


def test_the_gate_of_another_value_is_no_gelu():
    t = Toy(x=["b", 8], y=["b", 8])
    t.output(products(t, t.x, erf_gate(t, t.y), 0))
    assert ops(same(t.graph(), FuseGelu(), b=3))["Gelu"] == 0


def test_another_factor_is_no_gelu():
    t = Toy(x=["b", 8])
    t.output(t("Mul", t("Mul", t.x, erf_gate(t, t.x)), 0.25))
    assert ops(same(t.graph(), FuseGelu(), b=3))["Gelu"] == 0
