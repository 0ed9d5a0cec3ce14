from __future__ import annotations

import pytest

from hal.passes import FuseGatedMlp
from tests.passes.toys import Toy, ops, same


@pytest.mark.parametrize("alpha", [1.0, 1.702])
def test_x_times_its_sigmoid_is_swish(alpha: float):
    t = Toy(x=["b", 8])
    inner = t.x if alpha == 1.0 else t("Mul", t.x, alpha)
    t.output(t("Mul", t("Sigmoid", inner), t.x))
    result = same(t.graph(), FuseGatedMlp(), b=2)
    assert ops(result) == {"Swish": 1}
    (node,) = result.nodes()
    attribute = node.attributes.get("alpha")
    assert (attribute.value if attribute else 1.0) == pytest.approx(alpha)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_gated_mlp_ends_in_one_op(swapped: bool):
    t = Toy(x=["b", "s", 8])
    gate, up = t("MatMul", t.x, t.weight(8, 16)), t("MatMul", t.x, t.weight(8, 16))
    active = t("Mul", gate, t("Sigmoid", gate))
    t.output(t("MatMul", t("Mul", *((up, active) if swapped else (active, up))), t.weight(16, 8)))
    assert ops(same(t.graph(), FuseGatedMlp(), b=2, s=3)) == {"MatMul": 3, "SwiGLU": 1}


def test_a_broadcast_product_keeps_swish_apart():
    t = Toy(x=["b", 8], y=[1, 8])
    t.output(t("Mul", t("Mul", t.x, t("Sigmoid", t.x)), t.y))
    assert ops(same(t.graph(), FuseGatedMlp(), b=2)) == {"Swish": 1, "Mul": 1}


def test_the_sigmoid_of_another_value_stays():
    t = Toy(x=["b", 8], y=["b", 8])
    t.output(t("Mul", t.x, t("Sigmoid", t.y)))
    assert ops(same(t.graph(), FuseGatedMlp(), b=2)) == {"Sigmoid": 1, "Mul": 1}
