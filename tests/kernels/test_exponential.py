"""The exponential in arithmetic: near the C library's, saturated at both ends."""

from __future__ import annotations

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

from tvm import te  # noqa: E402

from hal.kernels.exponential import HIGHEST, LOWEST, exponential  # noqa: E402


@pytest.fixture(scope="module")
def compiled() -> object:
    x = te.placeholder((4096,), "float32", name="x")
    y = te.compute(x.shape, lambda i: exponential(x[i]), name="y")
    function = te.create_prim_func([x, y]).with_attr("global_symbol", "main")
    return tvm.compile(tvm.IRModule({"main": function}), target="llvm")


def run(compiled: object, x: np.ndarray) -> np.ndarray:
    padded = np.zeros(4096, np.float32)
    padded[: len(x)] = x
    result = tvm.runtime.tensor(np.zeros(4096, np.float32))
    compiled["main"](tvm.runtime.tensor(padded), result)  # type: ignore[index]
    return np.asarray(result.numpy()[: len(x)])


def test_it_is_near_the_exact_one(compiled: object) -> None:
    x = np.linspace(LOWEST, HIGHEST, 4096).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.max(np.abs(run(compiled, x) - exact) / exact) < 3e-7
    np.testing.assert_array_equal(run(compiled, np.zeros(3, np.float32)), 1.0)


def test_beyond_its_ends_it_stays_there(compiled: object) -> None:
    x = np.array([-np.inf, -1e30, -100, LOWEST, HIGHEST, 100, 1e30, np.inf], np.float32)
    found = run(compiled, x)
    np.testing.assert_array_equal(found[:4], found[3])
    np.testing.assert_array_equal(found[4:], found[4])
    assert np.isfinite(found).all()


def test_no_number_stays_none(compiled: object) -> None:
    assert np.isnan(run(compiled, np.array([np.nan], np.float32)))[0]
