"""The mixture of experts against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

from hal.kernels import moe  # noqa: E402

EXPERTS, CHOICES = 5, 2


def _run(kernel: Any, *arrays: np.ndarray) -> None:
    module = tvm.IRModule({"kernel": kernel.with_attr("global_symbol", "kernel")})
    compiled = tvm.compile(module, target=tvm.target.Target({"kind": "llvm"}))
    tensors = [tvm.runtime.tensor(a) for a in arrays]
    compiled["kernel"](*tensors)
    arrays[-1][...] = tensors[-1].numpy()


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize(("tokens", "hidden", "inner"), [(1, 24, 12), (7, 24, 12), (3, 17, 5)])
def test_experts_equal_a_loop_over_tokens(tokens: int, hidden: int, inner: int) -> None:
    rng = np.random.default_rng(tokens)
    x = rng.standard_normal((tokens, hidden), np.float32)
    index = rng.integers(0, EXPERTS, (tokens, CHOICES))
    index[0, 1] = -1  # contributes nothing
    weight = rng.random((tokens, CHOICES), np.float32)
    gate_up = rng.standard_normal((EXPERTS, 2 * inner, hidden), np.float32)
    down = rng.standard_normal((EXPERTS, hidden, inner), np.float32)
    h = np.empty((tokens, CHOICES, inner), np.float32)
    y = np.empty((tokens, hidden), np.float32)
    _run(moe.gate_up(EXPERTS, hidden, inner, CHOICES, 8, "silu"), x, index, gate_up, h)
    _run(moe.down(EXPERTS, hidden, inner, CHOICES, 8), h, index, weight, down, y)
    expected = np.zeros_like(y)
    for t in range(tokens):
        for e, w in zip(index[t], weight[t], strict=True):
            if e >= 0:
                gate, up = np.split(gate_up[e] @ x[t], 2)
                expected[t] += w * (down[e] @ (_silu(gate) * up))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
