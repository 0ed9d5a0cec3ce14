from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hal.passes.quantize.ranges import RULES, Coding, Histogram

NUMBERS = st.floats(-1e4, 1e4, width=32)


def histogram(values: np.ndarray) -> Histogram:
    found = Histogram(float(values.min()), float(values.max()))
    found.add(values)
    return found


@given(NUMBERS, NUMBERS, st.sampled_from(["uint8", "int8"]))
def test_codes_cover_a_range_and_hold_zero(low: float, high: float, dtype: str) -> None:
    low, high = min(low, high), max(low, high)
    coding = Coding.covering(low, high, dtype)
    assert coding.rounded(np.zeros(1))[0] == 0
    edges = np.array([min(low, 0), max(high, 0)])
    assert np.abs(coding.rounded(edges) - edges).max() <= coding.scale * 1.001 + 1e-30


@given(st.floats(1.0, 1e4, width=32))
def test_codes_do_not_go_beyond_a_limit_that_starts_at_zero(limit: float) -> None:
    coding = Coding.covering(0, limit)
    assert coding.zero == 0
    assert np.float32(255) * np.float32(coding.scale) <= np.float32(limit)


def test_a_range_may_leave_out_what_is_rare() -> None:
    values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    values[0] = 300
    found = histogram(values)
    candidates = found.candidates()
    assert list(candidates) == list(RULES)
    errors = [found.error(Coding.covering(*candidates[rule])) for rule in RULES]
    assert candidates["min-max"][1] == pytest.approx(300)
    assert candidates["percentile"][1] < 10
    assert errors[2] < errors[0]


def test_a_tensor_of_zeros_has_a_range() -> None:
    found = histogram(np.zeros((3, 4), np.float32))
    assert {Coding.covering(*r) for r in found.candidates().values()} == {Coding(1.0, 0)}
