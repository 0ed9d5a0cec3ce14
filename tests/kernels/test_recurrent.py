"""Linear attention and the causal convolution against NumPy, on several threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

from hal.kernels import causal_conv, linear_attention  # noqa: E402


def _run(kernel: Any, *arrays: np.ndarray, outputs: int = 2) -> list[np.ndarray]:
    module = tvm.IRModule({"kernel": kernel.with_attr("global_symbol", "kernel")})
    compiled = tvm.compile(module, target=tvm.target.Target({"kind": "llvm"}))
    tensors = [tvm.runtime.tensor(a) for a in arrays]
    compiled["kernel"](*tensors)
    return [t.numpy() for t in tensors[-outputs:]]


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


@pytest.mark.parametrize(("width", "lanes"), [(16, 4), (64, 8), (5, 8)])
@pytest.mark.parametrize("length", [0, 1, 6])
def test_linear_attention_equals_a_loop_over_tokens(width: int, lanes: int, length: int) -> None:
    batch, heads, group, size = 2, 3, 2, 7
    form = linear_attention.Form(heads, group, size, width, 1, heads, 0.5)
    q, k = _random(batch, length, heads * group * size), _random(batch, length, heads * size) / 3
    v, past = _random(batch, length, heads * width), _random(batch, heads, size, width)
    decay, rate = np.exp(-np.abs(_random(2, batch, length, heads)))
    y = np.empty((batch, length, heads * group * width), np.float32)
    kernel = linear_attention.linear_attention(form, lanes)
    got, state = _run(kernel, q, k, v, past, decay, rate, y, np.empty_like(past))
    expected, s = np.empty((batch, length, heads, group, width), np.float32), past.copy()
    for t in range(length):
        key, value = k[:, t].reshape(batch, heads, size), v[:, t].reshape(batch, heads, width)
        s = s * decay[:, t, :, None, None]
        write = (value - np.einsum("bhkv,bhk->bhv", s, key)) * rate[:, t, :, None]
        s = s + key[..., None] * write[:, :, None]
        queries = q[:, t].reshape(batch, heads, group, size)
        expected[:, t] = np.einsum("bhkv,bhgk->bhgv", s, queries) * 0.5
    np.testing.assert_allclose(got, expected.reshape(y.shape), atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(state, s, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [0, 1, 2, 9])
def test_a_causal_convolution_looks_back_into_the_past(length: int) -> None:
    batch, channels, taps = 2, 5, 4
    x, past = _random(batch, channels, length), _random(batch, channels, taps - 1)
    weight, bias = _random(channels, 1, taps), _random(channels)
    kernel = causal_conv.causal_conv(channels, taps, "none")
    got, present = _run(kernel, x, weight, bias, past, np.empty_like(x), np.empty_like(past))
    whole = np.concatenate([past, x], -1)
    expected = np.empty_like(x)
    for t in range(length):
        expected[..., t] = (whole[..., t : t + taps] * weight[:, 0]).sum(-1) + bias
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_array_equal(present, whole[..., length:])
