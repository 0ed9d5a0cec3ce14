from __future__ import annotations

import numpy as np
import pytest

from hal.passes.quantize.factor import lower_factor, solve


@pytest.mark.parametrize("size", [5, 256, 700])
def test_the_factor_is_that_of_the_library_and_solves(size: int) -> None:
    rng = np.random.default_rng(size)
    root = rng.standard_normal((size, size + 20))
    matrix = root @ root.T / size + np.eye(size)
    factor = lower_factor(matrix)
    np.testing.assert_allclose(factor, np.linalg.cholesky(matrix), atol=1e-9)
    right = rng.standard_normal((size, 3))
    np.testing.assert_allclose(matrix @ solve(factor, right), right, atol=1e-8)


def test_what_is_not_positive_definite_is_refused() -> None:
    with pytest.raises(np.linalg.LinAlgError):
        lower_factor(-np.eye(300))
