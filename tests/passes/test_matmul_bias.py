from __future__ import annotations

import numpy as np
import pytest

from hal.passes import CanonicalMatMul
from tests.passes.toys import Toy, ops, same


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("bias", ["", "vector", "scaled"])
def test_gemm_becomes_a_product_and_a_sum(trans_a: int, trans_b: int, bias: str):
    t = Toy(x=[8, "n"] if trans_a else ["n", 8])
    weight = t.weight(16, 8) if trans_b else t.weight(8, 16)
    inputs = [t.x, weight, *([t.weight(16)] if bias else [])]
    factors = {"alpha": 0.5, "beta": 2.0} if bias == "scaled" else {}
    t.output(t("Gemm", *inputs, transA=trans_a, transB=trans_b, **factors))
    result = same(t.graph(), CanonicalMatMul(), n=3)
    expected = {"MatMul": 1}
    if bias:
        expected["Add"] = 1
    if trans_a:
        expected["Transpose"] = 1
    assert ops(result) == expected


def test_the_bias_is_the_second_operand():
    t = Toy(x=["n", 8])
    t.output(t("Add", t.weight(4), t("MatMul", t.x, t.weight(8, 4))))
    (add,) = (n for n in same(t.graph(), CanonicalMatMul(), n=3).nodes() if n.op_type == "Add")
    assert add.inputs[1].is_initializer()


@pytest.mark.parametrize("bias", [False, True])
def test_rows_are_not_flattened_for_a_product(bias: bool):
    t = Toy(x=["b", "s", 8])
    rows = t("MatMul", t("Reshape", t.x, np.array([-1, 8])), t.weight(8, 4))
    rows = t("Add", rows, t.weight(4)) if bias else rows
    shape = t("Concat", t("Shape", t.x, start=0, end=2), np.array([4]), axis=0)
    t.output(t("Reshape", rows, shape))
    result = same(t.graph(), CanonicalMatMul(), b=2, s=3)
    assert ops(result) == ({"MatMul": 1, "Add": 1} if bias else {"MatMul": 1})
