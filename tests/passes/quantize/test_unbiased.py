"""Scales that keep a weight's size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hal.passes.quantize.formats import parse_format
from hal.passes.quantize.rtn import in_blocks, round_to_nearest
from hal.passes.quantize.unbiased import unbiased

FORMATS = ["w4a16", "w4a16-asym", "w3a16-g64", "w2a16", "w2a16-asym", "w4a16-channel", "ternary"]


def matrix(seed: int, rows: int = 16, columns: int = 96) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


@pytest.mark.parametrize("text", FORMATS)
@settings(deadline=None, max_examples=8)
@given(st.integers(0, 2**31), st.booleans())
def test_the_error_of_a_block_is_at_right_angles_to_its_weight(
    text: str, seed: int, weighed: bool
) -> None:
    form, weight = parse_format(text), matrix(seed)
    importance = None
    if weighed:
        importance = np.random.default_rng(seed).uniform(0.5, 2, 96).astype(np.float32)
    plain = round_to_nearest(weight, form, importance)
    found = unbiased(plain, weight, importance)
    np.testing.assert_array_equal(found.codes, plain.codes)
    goal = in_blocks(weight if importance is None else weight * importance, form.group)
    size = (goal * in_blocks(weight, form.group)).sum(1)
    kept = (goal * in_blocks(found.dequantized(), form.group)).sum(1)
    np.testing.assert_allclose(kept, size, rtol=2e-3)  # float16 scales
    before = (goal * in_blocks(plain.dequantized(), form.group)).sum(1)
    assert before.sum() < 0.999 * size.sum()


def test_layer_upon_layer_keeps_the_size_of_what_runs_through() -> None:
    form, generator = parse_format("w2a16"), np.random.default_rng(0)
    x = generator.standard_normal((64, 256)).astype(np.float32)
    exact, least, whole = x, x, x
    for _ in range(6):
        weight = generator.standard_normal((256, 256)).astype(np.float32) / 16
        codes = round_to_nearest(weight, form)
        exact = exact @ weight.T
        least = least @ codes.dequantized().T
        whole = whole @ unbiased(codes, weight).dequantized().T

    def part(found: np.ndarray) -> float:
        """How much of the exact result is in what was found."""
        return float((found * exact).sum() / (exact * exact).sum())

    assert part(least) < 0.7
    assert abs(part(whole) - 1) < 0.1


def test_zeros_lost_blocks_and_powers_of_two_stay() -> None:
    weight = np.zeros((2, 64), np.float32)
    weight[1, 0] = 1.0
    weight[1, 1:32] = 0.3  # a scale that holds the outlier rounds all others to nothing
    form = parse_format("ternary")
    plain = round_to_nearest(weight, form)
    found = unbiased(plain, weight)
    assert np.isfinite(found.scale).all()
    assert not found.dequantized()[0].any()
    assert (np.abs(found.scale) <= 2 * np.abs(plain.scale) + 1e-3).all()
    floats = round_to_nearest(matrix(1), parse_format("mxfp4"))
    np.testing.assert_array_equal(unbiased(floats, matrix(1)).scale, floats.scale)
