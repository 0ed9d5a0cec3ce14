from __future__ import annotations

import numpy as np
import pytest

from hal.passes import FuseLayerNorm
from tests.passes.toys import Toy, ops, same


def normal(t: Toy, x, axes=(-1,), divide=True):
    center = t("Sub", x, t("ReduceMean", x, np.array(axes)))
    variance = t("ReduceMean", t("Pow", center, 2.0), np.array(axes))
    root = t("Sqrt", t("Add", variance, 1e-12))
    return t("Div", center, root) if divide else t("Mul", center, t("Reciprocal", root))


@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("parts", ["", "weight", "weight bias"])
def test_a_decomposed_norm_becomes_one_op(divide: bool, parts: str):
    t = Toy(x=["b", "s", 8])
    value = normal(t, t.x, divide=divide)
    if "weight" in parts:
        value = t("Mul", value, t.weight(8))
    if "bias" in parts:
        value = t("Add", t.weight(8), value)
    t.output(value)
    result = same(t.graph(), FuseLayerNorm(), b=2, s=3)
    assert ops(result) == {"LayerNormalization": 1}


def test_a_norm_over_channels_first_stays():
    t = Toy(x=["b", 8, 4])
    t.output(normal(t, t.x, axes=(1,)))
    assert ops(same(t.graph(), FuseLayerNorm(), b=2))["LayerNormalization"] == 0


def test_a_residual_after_the_norm_is_not_its_bias():
    t = Toy(x=["b", 8])
    t.output(t("Add", normal(t, t.x), t.x))
    assert ops(same(t.graph(), FuseLayerNorm(), b=2)) == {"LayerNormalization": 1, "Add": 1}
