from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("tvm")

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
