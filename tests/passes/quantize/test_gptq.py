from __future__ import annotations

import itertools

import numpy as np
import pytest

from hal.passes.quantize.calibration import Statistics
from hal.passes.quantize.codes import Codes
from hal.passes.quantize.formats import parse_format
from hal.passes.quantize.gptq import Options, gptq
from hal.passes.quantize.rtn import round_to_nearest

RNG = np.random.default_rng(3)
FORMATS = ("w4-g32", "w4-g32-asym", "w3-g32", "w3-g32-asym", "w2-g16", "w2-channel", "ternary-g32")


def correlated(tokens: int, channels: int) -> np.ndarray:
    """Inputs that mostly lie in a few directions, with channels of different size."""
    rng = np.random.default_rng(5)
    few = rng.standard_normal((tokens, channels // 4)) @ rng.standard_normal(
        (channels // 4, channels)
    )
    x = few + 0.3 * rng.standard_normal((tokens, channels))
    return (x * np.exp(rng.standard_normal(channels))).astype(np.float32)


def gram(x: np.ndarray) -> np.ndarray:
    return (x.T @ x / len(x)).astype(np.float32)


def halves(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Mean products of every other token, as ``Statistics`` has them."""
    return np.stack([left[i::2].T @ right[i::2] / np.float32(len(left) / 2) for i in (0, 1)])


def error(weight: np.ndarray, codes: Codes, matrix: np.ndarray) -> float:
    left = weight - codes.dequantized()
    return float(np.einsum("nk,kj,nj->", left, matrix, left))


@pytest.mark.parametrize("text", FORMATS)
def test_results_on_correlated_inputs_are_much_better_than_rounding(text: str) -> None:
    form = parse_format(text)
    matrix = gram(correlated(500, 96))
    weight = RNG.standard_normal((24, 96)).astype(np.float32)
    found = gptq(weight, form, Statistics(matrix))
    nearest = round_to_nearest(weight, form, np.diagonal(matrix))
    assert error(weight, found, matrix) < 0.7 * error(weight, nearest, matrix)
    assert found.scale.dtype == np.float16
    if form.symmetric:
        assert found.zero is None
        assert form.lowest <= found.codes.min() <= found.codes.max() <= form.highest
    else:
        assert found.zero is not None
        assert found.codes.dtype == np.uint8
        assert found.codes.max() <= form.levels


@pytest.mark.parametrize("text", FORMATS)
def test_each_sweep_lowers_the_error(text: str) -> None:
    matrix = gram(correlated(500, 64))
    damped = matrix + np.eye(64, dtype=np.float32) * np.float32(0.01 * np.trace(matrix) / 64)
    weight = RNG.standard_normal((16, 64)).astype(np.float32)
    errors = [
        error(
            weight, gptq(weight, parse_format(text), Statistics(matrix), Options(sweeps=n)), damped
        )
        for n in range(4)
    ]
    assert errors[1] < errors[0]
    assert all(later <= earlier * 1.0001 for earlier, later in itertools.pairwise(errors))


def test_white_inputs_give_what_rounding_gives() -> None:
    weight = RNG.standard_normal((8, 64)).astype(np.float32)
    form = parse_format("w4-g32")
    found = gptq(weight, form, Statistics(np.eye(64, dtype=np.float32)))
    np.testing.assert_array_equal(found.codes, round_to_nearest(weight, form).codes)


def test_a_group_that_does_not_divide_and_channels_that_are_never_used() -> None:
    x = correlated(300, 72)
    x[:, 5] = 0
    weight = RNG.standard_normal((9, 72)).astype(np.float32)
    found = gptq(weight, parse_format("w4-g32"), Statistics(gram(x)))
    assert found.codes.shape == (9, 72)
    assert found.scale.shape == (9, 3)
    assert np.isfinite(found.dequantized()).all()
    assert error(weight, found, gram(x)) < 0.02 * float(np.sum((weight @ x.T) ** 2)) / len(x)


def test_inputs_that_are_all_zero_leave_rounding() -> None:
    weight = RNG.standard_normal((8, 64)).astype(np.float32)
    form = parse_format("w4-g32")
    found = gptq(weight, form, Statistics(np.zeros((64, 64), np.float32)))
    np.testing.assert_array_equal(found.codes, round_to_nearest(weight, form).codes)


@pytest.mark.parametrize("wide", [True, False])
def test_what_moved_inputs_lack_is_made_up_for(wide: bool) -> None:
    before = correlated(2000, 64)
    moved = before + (0.1 * before[:, ::-1])
    rows = 96 if wide else 24
    weight = RNG.standard_normal((rows, 64)).astype(np.float32)
    cross = halves(before - moved, moved)
    given = {"cross": cross} if wide else {"lacking": weight @ cross}
    form = parse_format("w4-g32")

    def miss(codes: Codes) -> float:
        return float(np.linalg.norm(before @ weight.T - moved @ codes.dequantized().T))

    plain = gptq(weight, form, Statistics(gram(moved)))
    assert miss(gptq(weight, form, Statistics(gram(moved), **given))) < 0.7 * miss(plain)


@pytest.mark.parametrize("signal", [0.0, 1.0])
def test_what_results_lack_that_inputs_do_not_tell_of_is_left_alone(signal: float) -> None:
    """Noise ten times as large as the results, and few tokens, which a fit would follow."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((300, 128)).astype(np.float32)
    weight = rng.standard_normal((48, 128)).astype(np.float32)
    wanted = signal * rng.standard_normal((48, 128)).astype(np.float32)
    noise = 100 * rng.standard_normal((300, 48)).astype(np.float32)
    lacking = halves(x @ wanted.T + noise * (1 - signal), x)
    found = gptq(weight, parse_format("w8-g32"), Statistics(gram(x), None, lacking)).dequantized()
    fresh = rng.standard_normal((300, 128)).astype(np.float32)
    miss = np.linalg.norm(fresh @ (weight + wanted - found).T) / np.linalg.norm(fresh @ weight.T)
    assert miss < (0.6 if signal else 0.3)
