from __future__ import annotations

import numpy as np
import pytest

from hal.passes import FuseRmsNorm
from tests.passes.toys import Toy, ops, same


def squares(t: Toy, x, form: str):
    return t("Mul", x, x) if form == "mul" else t("Pow", x, 2.0)


def divided(t: Toy, x, radicand, form: str):
    if form == "div":
        return t("Div", x, t("Sqrt", radicand))
    if form == "pow":
        return t("Mul", t("Pow", radicand, -0.5), x)
    if form == "one over":
        return t("Mul", x, t("Div", 1.0, t("Sqrt", radicand)))
    return t("Mul", x, t("Reciprocal", t("Sqrt", radicand)))


@pytest.mark.parametrize("square", ["mul", "pow"])
@pytest.mark.parametrize("form", ["div", "pow", "one over", "reciprocal"])
@pytest.mark.parametrize("epsilon", [1e-6, [1e-5]])
def test_every_spelling_becomes_one_op(square: str, form: str, epsilon):
    t = Toy(x=["b", "s", 8])
    mean = t("ReduceMean", squares(t, t.x, square), np.array([-1]))
    normal = divided(t, t.x, t("Add", mean, epsilon), form)
    t.output(t("Mul", t.weight(8), normal))
    assert ops(same(t.graph(), FuseRmsNorm(), b=2, s=3)) == {"RMSNormalization": 1}


def norm(t: Toy, x, weight=None, axes=(-1,), epsilon=1e-6):
    mean = t("ReduceMean", t("Pow", x, 2.0), np.array(axes))
    normal = t("Mul", x, t("Reciprocal", t("Sqrt", t("Add", mean, epsilon))))
    return normal if weight is None else t("Mul", normal, weight)


def test_an_offset_of_the_weight_is_folded():
    t = Toy(x=["b", 8])
    t.output(norm(t, t.x, t("Add", t.weight(8), 1.0)))
    assert ops(same(t.graph(), FuseRmsNorm(), b=2)) == {"RMSNormalization": 1}


def test_a_norm_without_weight_gets_ones():
    t = Toy(x=["b", 8])
    t.output(norm(t, t.x))
    assert ops(same(t.graph(), FuseRmsNorm(), b=2)) == {"RMSNormalization": 1}


def test_half_precision_with_a_float32_inside_keeps_its_type():
    t = Toy()
    x = t.add_input("x", ["b", 8], "FLOAT16")
    normal = t("Cast", norm(t, t("Cast", x, to=1)), to=10)
    made = t("Mul", t.constant(np.linspace(0.5, 2, 8).astype(np.float16)), normal)
    t.output(t("Cast", made, to=1))
    result = same(t.graph(), FuseRmsNorm(), tolerance=2e-3, b=2)
    assert ops(result) == {"RMSNormalization": 1, "Cast": 1}


def test_a_weight_applied_in_float32_keeps_its_casts():
    t = Toy()
    x = t.add_input("x", ["b", 8], "FLOAT16")
    t.output(t("Cast", t("Cast", norm(t, t("Cast", x, to=1), t.weight(8)), to=10), to=1))
    result = same(t.graph(), FuseRmsNorm(), tolerance=2e-3, b=2)
    assert ops(result, "RMSNormalization", "Cast") == {"RMSNormalization": 1, "Cast": 3}


def test_several_trailing_axes_are_one_norm():
    t = Toy(x=["b", 4, 8])
    t.output(norm(t, t.x, t.weight(4, 8), axes=(1, 2)))
    assert ops(same(t.graph(), FuseRmsNorm(), b=2)) == {"RMSNormalization": 1}


@pytest.mark.parametrize(
    "build",
    [
        lambda t: norm(t, t.x, axes=(1,)),
        lambda t: norm(t, t.x, epsilon=0.5),
        lambda t: t("Div", t.x, t("Sqrt", t("ReduceMean", t("Mul", t.x, t.y), np.array([-1])))),
        lambda t: t(
            "Mul",
            t.y,
            t(
                "Reciprocal",
                t("Sqrt", t("Add", t("ReduceMean", t("Pow", t.x, 2.0), np.array([-1])), 1e-6)),
            ),
        ),
    ],
)
def test_what_is_no_norm_stays(build):
    t = Toy(x=["b", 4, 8], y=["b", 4, 8])
    t.output(build(t))
    graph = t.graph()
    result = same(graph, FuseRmsNorm(), b=2)
    assert ops(result)["RMSNormalization"] == 0


def test_an_intermediate_that_is_used_elsewhere_is_kept():
    t = Toy(x=["b", 8])
    normal = norm(t, t.x)
    t.output(t("Mul", normal, t.weight(8)), "y")
    t.output(t("Neg", normal), "z")
    result = same(t.graph(), FuseRmsNorm(), b=2)
    assert ops(result) == {"RMSNormalization": 1, "Mul": 1, "Neg": 1}
