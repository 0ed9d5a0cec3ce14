"""The cache kernels against loops in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests import cache

tvm = pytest.importorskip("tvm")

from hal.kernels import cache as kernels  # noqa: E402
from hal.kernels.attention_plan import Attention  # noqa: E402

TARGET = {"kind": "llvm"}


def compiled(function: Any) -> Any:
    return tvm.compile(tvm.IRModule({"main": function}), target=tvm.target.Target(TARGET))["main"]


def device(array: np.ndarray) -> Any:
    return tvm.runtime.tensor(np.ascontiguousarray(array))


def attend(p: dict[str, np.ndarray], shape: tuple[int, ...], **settings: Any) -> np.ndarray:
    scales = p.get("ks", np.zeros((1, 1, 1, 1), np.float16))
    out = device(np.zeros(shape, np.float32))
    spec = Attention(heads=4, channels=p["q"].shape[3], scale=0.25, **settings)
    arguments = [p["q"], p["keys"], p["values"], p["table"], p["lengths"]]
    arguments += [scales, p.get("vs", scales)]
    sums = device(np.zeros((1, 1, 1), np.float32))
    compiled(kernels.attention(spec))(*map(device, arguments), out, sums)
    return out.numpy()


@pytest.mark.parametrize("new", [1, 3, 11])
def test_write_stores_each_position_in_its_page(new: int) -> None:
    p = cache.problem(new=new)  # of two rows: 11 are enough for threads
    pool = device(p["keys"])
    run = compiled(kernels.write(2, 16, "float32"))
    run(pool, device(p["k"]), device(p["table"]), device(p["lengths"]))
    expected = cache.write(p["keys"], p["k"], p["table"], p["lengths"])
    np.testing.assert_array_equal(pool.numpy(), expected)


@pytest.fixture(params=[3, 21], ids=["few queries", "many queries"])
def new(request: pytest.FixtureRequest) -> int:
    """Queries: those that are taken one by one, or side by side."""
    return int(request.param)


def problem(new: int, **sizes: Any) -> dict[str, np.ndarray]:
    """Room for so many."""
    return cache.problem(new=new, blocks=9, pages=20, **sizes)


@pytest.mark.parametrize(
    ("page", "settings"),
    [
        (4, {}),
        (40, {"lanes": 16, "cores": 4}),
        (100, {"window": 37}),
        (4, {"window": 5, "softcap": 1.5}),
    ],
)
def test_attention_sees_each_row_s_own_past(new: int, page: int, settings: dict[str, Any]) -> None:
    p = problem(new, page=page)
    fixed = {k: p[k] for k in ("q", "keys", "values", "table", "lengths")}
    limits = {k: v for k, v in settings.items() if k in ("window", "softcap")}
    expected = cache.attend(**fixed, scale=0.25, **limits)
    actual = attend(p, expected.shape, kv_heads=2, value_channels=16, **settings)
    np.testing.assert_allclose(actual, expected, atol=2e-6)


def test_values_may_be_the_first_channels_of_the_keys(new: int) -> None:
    p = problem(new, kv_heads=1)
    fixed = {k: p[k] for k in ("q", "keys", "table", "lengths")}
    expected = cache.attend(**fixed, values=p["keys"][..., :12], scale=0.25)
    p["values"] = p["keys"]
    actual = attend(p, expected.shape, kv_heads=1, value_channels=12, shared=True)
    np.testing.assert_allclose(actual, expected, atol=2e-6)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("page", [4, 40])
def test_quantized_pools_are_widened_on_the_way(new: int, bits: int, page: int) -> None:
    p = problem(new, page=page)
    fixed = {k: p[k] for k in ("q", "table", "lengths")}
    block = 8 if bits == 8 else 4
    p["keys"], p["ks"], keys = cache.quantized(p["keys"], bits, block)
    p["values"], p["vs"], values = cache.quantized(p["values"], bits, block)
    expected = cache.attend(**fixed, keys=keys, values=values, scale=0.25)
    actual = attend(p, expected.shape, kv_heads=2, value_channels=16, bits=bits, block=block)
    np.testing.assert_allclose(actual, expected, atol=2e-6)


@pytest.mark.parametrize(("bits", "size"), [(8, 8), (4, 8), (4, 12)])
def test_quantized_keys_may_hold_the_values_too(new: int, bits: int, size: int) -> None:
    p = problem(new, kv_heads=1)
    fixed = {k: p[k] for k in ("q", "table", "lengths")}
    p["keys"], p["ks"], keys = cache.quantized(p["keys"], bits, 4)
    p["values"], p["vs"] = p["keys"], p["ks"]
    expected = cache.attend(**fixed, keys=keys, values=keys[..., :size], scale=0.25)
    settings = {"bits": bits, "block": 4, "shared": True, "value_channels": size}
    actual = attend(p, expected.shape, kv_heads=1, **settings)
    np.testing.assert_allclose(actual, expected, atol=2e-6)


def test_positions_within_the_lag_are_not_seen(new: int) -> None:
    p = problem(new, page=40)
    fixed = {k: p[k] for k in ("q", "keys", "values", "table")}
    p["lengths"] = np.array([30, 50])
    expected = cache.attend(**fixed, lengths=p["lengths"] - 7, scale=0.25)
    actual = attend(p, expected.shape, kv_heads=2, value_channels=16, lag=7)
    np.testing.assert_allclose(actual, expected, atol=2e-6)
    p["lengths"] = np.array([2, 0])
    blind = attend(p, expected.shape, kv_heads=2, value_channels=16, lag=7)[:, :, :3]
    assert not blind.any()


@pytest.mark.parametrize(
    ("channels", "settings"),
    [
        (17, {}),
        (1, {}),
        (17, {"bits": 8, "block": 1}),
        (18, {"bits": 8, "block": 9}),
        (18, {"bits": 4, "block": 6}),
    ],
)
def test_heads_may_have_any_size(new: int, channels: int, settings: dict[str, int]) -> None:
    p = problem(new, page=40, channels=channels)
    fixed = {k: p[k] for k in ("q", "keys", "values", "table", "lengths")}
    if settings:
        for name, scales in (("keys", "ks"), ("values", "vs")):
            p[name], p[scales], fixed[name] = cache.quantized(p[name], **settings)
    expected = cache.attend(**fixed, scale=0.25)
    actual = attend(p, expected.shape, kv_heads=2, value_channels=channels, **settings)
    np.testing.assert_allclose(actual, expected, atol=2e-6)
