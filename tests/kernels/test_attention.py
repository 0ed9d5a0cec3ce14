"""Scores of attention against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

from hal.kernels import attention  # noqa: E402
from hal.kernels.vectors import vector_lanes  # noqa: E402


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 16), (2, 1, 17), (2, 2, 1)])
def test_scores_are_dot_products_for_heads_of_any_size(
    heads: int, kv_heads: int, size: int
) -> None:
    rng = np.random.default_rng(size)
    q = rng.standard_normal((2, heads, 3, size), np.float32)
    k = rng.standard_normal((2, kv_heads, 5, size), np.float32)
    module = tvm.IRModule({"main": attention.scores(heads, kv_heads, size, 8, 0.5)})
    out = tvm.runtime.tensor(np.zeros((2, heads, 3, 5), np.float32))
    run = tvm.compile(module, target=tvm.target.Target({"kind": "llvm"}))["main"]
    run(tvm.runtime.tensor(q), tvm.runtime.tensor(k), out)
    expected = 0.5 * q @ np.repeat(k, heads // kv_heads, 1).swapaxes(2, 3)
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("extent", "lanes"), [(64, 16), (24, 8), (6, 2), (7, 1)])
def test_vectors_divide_the_extent(extent: int, lanes: int) -> None:
    assert vector_lanes(extent, 16) == lanes
