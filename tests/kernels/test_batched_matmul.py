"""Products with a matrix for each head against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

from hal.kernels import batched_matmul  # noqa: E402


@pytest.mark.parametrize(("k", "n"), [(16, 64), (5, 24), (3, 17)])
def test_each_head_has_its_own_matrix(k: int, n: int) -> None:
    rng = np.random.default_rng(n)
    module = tvm.IRModule({"main": batched_matmul.per_head(3, k, n, 16)})
    run = tvm.compile(module, target=tvm.target.Target({"kind": "llvm"}))["main"]
    w = rng.standard_normal((3, k, n), np.float32)
    for rows in (1, 6, 15):
        x = rng.standard_normal((2, 3, rows, k), np.float32)
        out = tvm.runtime.tensor(np.full((2, 3, rows, n), np.nan, np.float32))
        run(tvm.runtime.tensor(x), tvm.runtime.tensor(w), out)
        np.testing.assert_allclose(out.numpy(), x @ w, rtol=1e-4, atol=1e-4)
