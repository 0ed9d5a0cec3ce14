"""Codes of the methods that look at nothing but the weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hal.passes.quantize.codes import Codes, in_a_file
from hal.passes.quantize.formats import Format, parse_format
from hal.passes.quantize.grid import STORED, round_to_grid
from hal.passes.quantize.hqq import half_quadratic
from hal.passes.quantize.rtn import round_to_nearest

FORMATS = [
    "w8-g32", "w8-channel", "w4-g16", "w4-g32-asym", "w4-channel", "w3-g64", "w3-g32-asym",
    "w2-g32", "w2-g32-asym", "ternary-g32", "fp8-g32", "fp8-channel", "mxfp4",
]  # fmt: skip


def matrix(seed: int, rows: int = 24, columns: int = 96) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, columns)) * rng.uniform(0.1, 3, (rows, 1))).astype(
        np.float32
    )


def plain(weight: np.ndarray, form: Format) -> float:
    """Squared error of the textbook scale, ``max |w| / highest``, without any search."""
    blocks = weight.reshape(-1, form.group or weight.shape[1])
    scale = np.abs(blocks).max(1, keepdims=True) / form.highest
    codes = np.clip(np.rint(blocks / scale), -form.highest, form.highest)
    return float(((blocks - codes * scale) ** 2).sum())


def error(weight: np.ndarray, codes: Codes) -> float:
    return float(((weight - codes.dequantized()) ** 2).sum())


@pytest.mark.parametrize("text", FORMATS)
@settings(deadline=None, max_examples=8)
@given(st.integers(0, 2**31))
def test_codes_stay_in_range_and_beat_the_plain_scale(text: str, seed: int) -> None:
    form = parse_format(text)
    weight = matrix(seed)
    found = round_to_nearest(weight, form)
    low, high = (form.lowest, form.highest) if form.symmetric else (0, form.levels)
    numbers = found.codes.astype(np.float32)
    assert low <= numbers.min()
    assert numbers.max() <= high
    if form.integer and form.symmetric and form.group != 64:  # 96 columns are no whole blocks of 64
        assert error(weight, found) <= plain(weight, form) * 1.001


@pytest.mark.parametrize("text", FORMATS)
def test_half_quadratic_is_better_in_the_norm_that_it_minimises(text: str) -> None:
    form = parse_format(text)
    weight = matrix(3)
    weight[::5, ::7] *= 8  # outliers

    def cost(codes: Codes) -> float:
        return float((np.abs(weight - codes.dequantized()) ** 0.7).sum())

    assert cost(half_quadratic(weight, form)) <= cost(round_to_nearest(weight, form)) * 1.0001


@pytest.mark.parametrize("text", ["fp8", "mxfp4"])
@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.floats(-12, 12))
def test_codes_that_are_floats_round_as_their_dtype_does(
    text: str, seed: int, exponent: float
) -> None:
    form = parse_format(text)
    values = np.random.default_rng(seed).standard_normal(500).astype(np.float32)
    values = np.clip(values * np.float32(2.0**exponent), form.lowest, form.highest)
    values[:4] = 0.25, 0.75, 2.5, 5  # ties
    wanted = values.astype(STORED[text]).astype(np.float32)
    np.testing.assert_array_equal(round_to_grid(values, form), wanted)


def test_floats_of_four_bits_have_powers_of_two_as_scales_and_the_best_ones() -> None:
    form, weight = parse_format("mxfp4"), matrix(7)
    found = round_to_nearest(weight, form)
    assert not np.any(np.frexp(found.scale)[0] != 0.5)
    blocks = weight.reshape(-1, 32)
    largest = np.abs(blocks).max(1, keepdims=True)
    scale = np.exp2(np.floor(np.log2(largest)) - 2)  # what the OCP specification proposes
    codes = np.clip(round_to_grid(blocks / scale, form), -6, 6)
    assert error(weight, found) <= float(((blocks - codes * scale) ** 2).sum())
    assert found.nbytes == weight.size // 2 + weight.size // 32


def test_blocks_of_zeros_and_the_whole_negative_range_are_exact() -> None:
    weight = np.zeros((2, 32), np.float32)
    weight[1] = np.tile(np.arange(-8, 8), 2)
    found = round_to_nearest(weight, Format(4))
    np.testing.assert_allclose(found.dequantized(), weight, atol=1e-3)
    assert not round_to_nearest(weight, Format(4, symmetric=False)).dequantized()[0].any()


def test_the_last_block_may_be_shorter() -> None:
    weight = matrix(1, 8, 100)
    found = round_to_nearest(weight, Format(8))
    assert found.scale.shape == (8, 4)
    assert np.abs(found.dequantized() - weight).max() < np.abs(weight).max() / 100


def test_important_columns_are_rounded_better() -> None:
    weight, importance = matrix(2), np.full(96, 1e-3)
    importance[::8] = 1
    form = Format(3)
    wrong = (weight - round_to_nearest(weight, form).dequantized())[:, ::8]
    less = (weight - round_to_nearest(weight, form, importance).dequantized())[:, ::8]
    assert (less**2).sum() < 0.8 * (wrong**2).sum()


def test_codes_of_many_layers_share_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hal.passes.quantize.codes._FILE", {})
    before = len(list(Path("/proc/self/fd").iterdir()))
    arrays = [np.full(1 << 18, i, np.uint8) for i in range(40)]
    found = [in_a_file(array) for array in arrays]
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2
    for array, mapped in zip(arrays, found, strict=True):
        assert mapped is not array
        np.testing.assert_array_equal(mapped, array)
    assert in_a_file(arrays[0][:8]) is not found[0]
