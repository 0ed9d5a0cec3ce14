from __future__ import annotations

import numpy as np

from hal.passes import CommonSubexpressions
from tests.passes.toys import Toy, ops, same


def test_what_is_computed_twice_is_computed_once():
    t = Toy(x=["n", 4])
    t.output(t("Add", t("Mul", t.x, 2.0), t("Mul", t.x, 2.0)))
    result = same(t.graph(), CommonSubexpressions(), n=2)
    assert ops(result) == {"Add": 1, "Mul": 1}
    assert len(result.graph.initializers) == 1


def test_ops_that_differ_in_an_attribute_stay_apart():
    t = Toy(x=["n", 4, 4])
    t.output(t("Sub", t("Softmax", t.x, axis=1), t("Softmax", t.x, axis=2)))
    assert ops(same(t.graph(), CommonSubexpressions(), n=2))["Softmax"] == 2


def test_two_outputs_with_one_value_keep_their_names():
    t = Toy(x=["n"])
    t.output(t("Relu", t.x), "a")
    t.output(t("Relu", t.x), "b")
    result = same(t.graph(), CommonSubexpressions(), n=2)
    assert [v.name for v in result.graph.outputs] == ["a", "b"]
    assert ops(result, "Relu") == {"Relu": 1}


def test_a_large_weight_is_shared_only_if_it_is_the_same_tensor():
    t = Toy(x=["n", 64])
    first = t.weight(64, 64)
    tied, copied = t.constant(np.zeros(1)), t.constant(first.const_value.numpy().copy())
    tied.const_value, tied.shape = first.const_value, first.shape
    total = t("Add", t("MatMul", t.x, first), t("MatMul", t.x, tied))
    t.output(t("Add", total, t("MatMul", t.x, copied)))
    result = same(t.graph(), CommonSubexpressions(), n=2, tolerance=1e-4)
    assert len(result.graph.initializers) == 2
    assert ops(result)["MatMul"] == 2
