from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")

from tvm import te, tirx

from hal.targets.tvm.schedule import _schedule_function
from tests.targets.tvm.support import compare, model


def test_a_condition_and_its_use_are_vectorized_together() -> None:
    proto = model(
        """g (float[n, 16] x, float[n, 16] z) => (float[n, 16] y) {
            below = Less (x, z)
            above = Not (below)
            e = Exp (x)
            y = Where (above, x, e)
        }"""
    )
    rng = np.random.default_rng(0)
    x, z = rng.standard_normal((2, 3, 16)).astype(np.float32)
    compare(proto, x=x, z=z)


def _script(*tensors: Any) -> str:
    made = _schedule_function(te.create_prim_func(list(tensors)), 16)
    assert made is not None
    return str(made.script())


def _rows(*dims: Any, name: str = "x") -> Any:
    return te.placeholder(dims, name=name)


def test_elements_go_to_cores_and_vectors() -> None:
    n = tirx.Var("n", "int64")
    x = _rows(n, 960)
    text = _script(x, te.compute((n, 960), lambda i, j: x(i, j) * tirx.const(2.0, "float32")))
    assert re.search(r"in T.parallel\((n|T.int64\(\d+\))\)", text)
    assert re.search(r"in T.vectorized\((T.int64\()?16\)", text)
    assert "//" not in text  # a row's place is no division


def test_a_sum_of_neighbours_is_one_in_each_lane() -> None:
    n = tirx.Var("n", "int64")
    x, r = _rows(n, 960), te.reduce_axis((0, 960), name="r")
    text = _script(x, te.compute((n,), lambda i: te.sum(x(i, r), axis=r)))
    assert "T.vectorized" in text
    assert "_rf" in text


def test_a_small_sum_starts_no_threads() -> None:
    x, r = _rows(1, 960), te.reduce_axis((0, 960), name="r")
    text = _script(x, te.compute((1,), lambda i: te.sum(x(i, r), axis=r)))
    assert "_rf" in text
    assert "T.parallel" not in text


def test_a_sum_over_what_is_far_apart_is_left_to_its_rows() -> None:
    x, r = _rows(960, 7), te.reduce_axis((0, 960), name="r")
    assert "_rf" not in _script(x, te.compute((7,), lambda i: te.sum(x(r, i), axis=r)))


def test_copies_are_not_made() -> None:
    n = tirx.Var("n", "int64")
    x = _rows(n, 64)
    half = te.compute((n, 32), lambda i, j: x(i, j + 32), name="half")
    text = _script(x, te.compute((n, 32), lambda i, j: half(i, j) + x(i, j)))
    assert "half" not in text


def test_what_is_wrong_in_a_schedule_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    x = _rows(4, 16)
    function = te.create_prim_func([x, te.compute((4, 16), lambda i, j: x(i, j) + x(i, j))])
    monkeypatch.setattr("hal.targets.tvm.schedule._inline", lambda plan: plan.no_such_method())
    with pytest.raises(AttributeError):
        _schedule_function(function, 16)
