"""The float32 product against NumPy, for every number of rows that has code of its own."""

from __future__ import annotations

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

from hal.kernels import matmul  # noqa: E402


@pytest.mark.parametrize(
    ("k", "n", "lanes", "registers"),
    [(13, 48, 16, 32), (33, 20, 4, 16), (matmul.PART + 5, 32, 8, 16)],
)
def test_a_product_equals_numpys_for_any_number_of_rows(
    k: int, n: int, lanes: int, registers: int
) -> None:
    kernel = matmul.row_major(k, n, lanes, registers, 2)
    assert kernel is not None
    module = tvm.IRModule({"kernel": kernel.with_attr("global_symbol", "kernel")})
    run = tvm.compile(module, target=tvm.target.Target({"kind": "llvm"}))["kernel"]
    w = np.random.default_rng(k).standard_normal((k, n), np.float32)
    for rows in (0, 1, 2, 4, 5, 15, 64, 77):
        x = np.random.default_rng(rows).standard_normal((rows, k)).astype(np.float32)
        out = tvm.runtime.tensor(np.full((rows, n), np.nan, np.float32))
        run(tvm.runtime.tensor(x), tvm.runtime.tensor(w), out)
        np.testing.assert_allclose(out.numpy(), x @ w, rtol=1e-4, atol=3e-4)


def test_columns_that_fill_no_vector_have_no_kernel() -> None:
    assert matmul.row_major(8, 7, 4) is None


def test_a_wide_matrix_is_cut_into_strips_for_all_cores() -> None:
    kernel = matmul.row_major(3, 3 * matmul.STRIP, 16, 32, 2)
    assert kernel is not None
    assert "parallel(4)" in kernel.script().replace("T.int64(4)", "4")


@pytest.mark.parametrize(
    ("n", "most", "count"), [(256, 4, 4), (48, 4, 1), (32, 4, 2), (8, 4, None)]
)
def test_tiles_are_whole_vectors(n: int, most: int, count: int | None) -> None:
    assert matmul.columns_per_tile(n, 16, most) == count
