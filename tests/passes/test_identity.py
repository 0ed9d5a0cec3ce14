from __future__ import annotations

import numpy as np
import pytest

from hal.passes import RemoveIdentities
from tests.passes.toys import Toy, ops, same


def chain(build, *dims):
    t = Toy(x=["batch", *(dims or (4, 6))])
    t.output(t("Relu", build(t, t("Neg", t.x))))
    return same(t.graph(), RemoveIdentities(), batch=2)


@pytest.mark.parametrize(
    "build",
    [
        lambda t, x: t("Identity", x),
        lambda t, x: t("Cast", x, to=1),
        lambda t, x: t("Dropout", x),
        lambda t, x: t("Transpose", x, perm=[0, 1, 2]),
        lambda t, x: t("Transpose", t("Transpose", x, perm=[0, 2, 1]), perm=[0, 2, 1]),
        lambda t, x: t("Reshape", x, np.array([0, 4, 6])),
        lambda t, x: t("Reshape", x, t("Shape", x)),
        lambda t, x: t("Expand", x, np.array([1, 1, 6])),
        lambda t, x: t("Slice", x, np.array([0]), np.array([2**63 - 1]), np.array([1])),
        lambda t, x: t("Mul", x, 1.0),
        lambda t, x: t("Add", [0.0], x),
        lambda t, x: t("Div", x, [[1.0]]),
        lambda t, x: t("Sub", x, 0.0),
        lambda t, x: t("Pow", x, 1.0),
        lambda t, x: t("Concat", x, axis=1),
        lambda t, x: t("Concat", x, np.zeros((2, 0, 6), np.float32), axis=1),
        lambda t, x: t("Split", x, np.array([6, 0]), axis=2, outputs=2)[0],
        lambda t, x: t("Squeeze", t("Unsqueeze", x, np.array([1])), np.array([1])),
    ],
)
def test_an_op_that_returns_its_input_goes(build):
    assert ops(chain(build)) == {"Neg": 1, "Relu": 1}


@pytest.mark.parametrize(
    ("build", "op"),
    [
        (lambda t, x: t("Cast", t("Cast", x, to=10), to=1), "Cast"),
        (lambda t, x: t("Transpose", x, perm=[0, 2, 1]), "Transpose"),
        (
            lambda t, x: t(
                "Slice", x, np.array([-1]), np.array([-99]), np.array([1]), np.array([-1])
            ),
            "Slice",
        ),
        (lambda t, x: t("Mul", x, 1.5), "Mul"),
        (lambda t, x: t("Sub", 0.0, x), "Sub"),
        (lambda t, x: t("Add", x, np.zeros((2, 1, 4, 6), np.float32)), "Add"),
        (lambda t, x: t("Expand", x, np.array([3, 1, 1, 1])), "Expand"),
    ],
)
def test_an_op_that_changes_something_stays(build, op: str):
    assert ops(chain(build))[op] >= 1


def test_two_transposes_become_one():
    result = chain(lambda t, x: t("Transpose", t("Transpose", x, perm=[1, 2, 0]), perm=[0, 2, 1]))
    assert ops(result, "Transpose") == {"Transpose": 1}


def test_only_the_last_of_two_reshapes_stays():
    result = chain(lambda t, x: t("Reshape", t("Reshape", x, np.array([-1, 6])), np.array([-1, 8])))
    assert ops(result, "Reshape") == {"Reshape": 1}


def test_a_graph_output_keeps_its_name_and_never_becomes_an_input():
    t = Toy(x=["n"])
    t.output(t("Identity", t.x), "y")
    t.output(t("Identity", t("Relu", t.x)), "z")
    result = same(t.graph(), RemoveIdentities(), n=3)
    assert [v.name for v in result.graph.outputs] == ["y", "z"]
    assert ops(result) == {"Identity": 1, "Relu": 1}
