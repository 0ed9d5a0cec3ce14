from __future__ import annotations

import numpy as np
import pytest

from hal.passes import FoldConv
from tests.passes.toys import Toy, ops, same

RNG = np.random.default_rng(7)


def batch_norm(t: Toy, x, channels: int):
    variance = t.constant(RNG.uniform(0.5, 2.0, channels).astype(np.float32))
    parameters = [t.weight(channels) for _ in range(3)]
    return t("BatchNormalization", x, *parameters, variance, epsilon=1e-3)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_batch_normalization_goes_into_the_weights(bias: bool, op: str):
    t = Toy(x=["b", 3, 8, 8])
    weight = t.weight(6, 3, 3, 3) if op == "Conv" else t.weight(3, 6, 3, 3)
    made = t(op, t.x, weight, *([t.weight(6)] if bias else []), pads=[1, 1, 1, 1])
    t.output(t("Relu", batch_norm(t, made, 6)))
    assert ops(same(t.graph(), FoldConv(), b=2)) == {op: 1, "Relu": 1}


def test_grouped_convolutions_fold_by_output_channel():
    t = Toy(x=["b", 4, 8])
    t.output(batch_norm(t, t("Conv", t.x, t.weight(8, 1, 3), group=4), 8))
    assert ops(same(t.graph(), FoldConv(), b=2)) == {"Conv": 1}


def test_factors_and_offsets_per_channel_fold():
    t = Toy(x=["b", 3, 8, 8])
    made = t("Conv", t.x, t.weight(6, 3, 1, 1))
    t.output(t("Add", t("Mul", made, t.weight(1, 6, 1, 1)), t.weight(6, 1, 1)))
    assert ops(same(t.graph(), FoldConv(), b=2)) == {"Conv": 1}


def test_a_batch_normalization_elsewhere_is_a_product_and_a_sum():
    t = Toy(x=["b", 3, 8])
    t.output(batch_norm(t, t("Relu", t.x), 3))
    assert ops(same(t.graph(), FoldConv(), b=2)) == {"Relu": 1, "Mul": 1, "Add": 1}


def test_an_offset_per_position_or_a_second_user_stays():
    t = Toy(x=["b", 3, 4])
    made = t("Conv", t.x, t.weight(3, 3, 1))
    t.output(t("Add", made, t.weight(1, 1, 4)), "y")
    other = t("Conv", t.x, t.weight(3, 3, 1))
    t.output(t("Mul", other, t.weight(1, 3, 1)), "z")
    t.output(t("Neg", other), "w")
    result = same(t.graph(), FoldConv(), b=2)
    assert ops(result) == {"Conv": 2, "Add": 1, "Mul": 1, "Neg": 1}
