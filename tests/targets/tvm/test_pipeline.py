"""What compiling prints and what it does not."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("tvm")

from hal.targets.tvm.direct import compile_graph
from tests.targets.onnxruntime.support import parse


def test_scattering_compiles_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    graph = parse(
        "g (float[4, 6] x, int64[1, 6] i, float[1, 6] u) => (float[4, 6] y)"
        " { y = ScatterElements <axis = 0> (x, i, u) }"
    )
    run = compile_graph(graph)
    x, index = np.zeros((4, 6), np.float32), np.array([[3, 0, 2, 1, 1, 0]])
    given = {"x": x, "i": index, "u": np.ones((1, 6), np.float32)}
    np.testing.assert_array_equal(run(given)["y"], np.arange(4)[:, None] == index)
    assert "arning" not in "".join(capfd.readouterr())
