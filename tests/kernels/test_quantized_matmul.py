"""Products with quantized weights against dequantized ones, on the host and on narrower chips."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tvm")

from hal.kernels.quantized_layout import Layout
from hal.kernels.quantized_matmul import matmul, prefetches, rows_per_block
from tests.kernels.support import check, chip


@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("name", ["host", "narrow"])
def test_float_activations_times_codes(name: str, bits: int, zeros: bool) -> None:
    on = chip(name)
    check(Layout(2 * on.lanes + 3, 72, bits, 32, on.lanes, zeros), on, 0)


@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_rounded_activations_times_codes_by_the_hosts_dot_product(bits: int, zeros: bool) -> None:
    on = chip("host")
    if on.dot is None:
        pytest.skip("this machine has no dot product of bytes")
    layout = Layout(
        on.dot.lanes, 96, bits, 32, on.dot.lanes, zeros, integer=True, signed=on.dot.signed
    )
    check(layout, on, 32)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("n", [32, 45])
def test_two_tiles_side_by_side(bits: int, n: int) -> None:
    on = chip("host")
    if on.dot is None:
        pytest.skip("this machine has no dot product of bytes")
    lanes, signed = on.dot.lanes, on.dot.signed
    check(Layout(n, 96, bits, 32, lanes, integer=True, signed=signed, tiles=2), on, 32)


def test_rounded_activations_without_a_dot_product_are_floats() -> None:
    check(Layout(11, 64, 4, 32, 4), chip("narrow"), 32)


def test_one_scale_for_a_row_and_one_for_a_token() -> None:
    on = chip("host")
    integer = on.dot is not None
    signed = on.dot is not None and on.dot.signed
    lanes = on.dot.lanes if on.dot else on.lanes
    layout = Layout(lanes, 301, 8, 301, lanes, integer=integer, signed=signed)
    check(layout, on, 301)


def test_a_scale_for_a_token_over_several_groups() -> None:
    on = chip("host")
    if on.dot is None:
        pytest.skip("this machine has no dot product of bytes")
    layout = Layout(20, 128, 4, 32, on.dot.lanes, integer=True, signed=on.dot.signed)
    check(layout, on, 128)


@settings(max_examples=5, deadline=None)
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 80),
    bits=st.sampled_from([8, 4, 3, 2]),
    group=st.sampled_from([16, 32, 64]),
    zeros=st.booleans(),
    integer=st.booleans(),
)
def test_any_shape_is_padded(
    n: int, k: int, bits: int, group: int, zeros: bool, integer: bool
) -> None:
    on = chip("host")
    integer = integer and on.dot is not None
    lanes = on.dot.lanes if integer and on.dot else on.lanes
    signed = integer and on.dot is not None and on.dot.signed
    layout = Layout(n, k, bits, min(group, k), lanes, zeros, integer, signed)
    check(layout, on, min(group, k) if integer else 0)


@pytest.mark.parametrize(("registers", "rows"), [(32, 8), (16, 4), (8, 2), (4, 1)])
def test_rows_of_a_block_follow_the_registers(registers: int, rows: int) -> None:
    assert rows_per_block(registers) == rows


@pytest.mark.parametrize(
    ("layout", "ahead"),
    [
        (Layout(32, 64, 4, 32, 4), True),
        (Layout(32, 64, 8, 32, 4), True),
        (Layout(32, 64, 4, 32, 4, integer=True), True),
        (Layout(32, 64, 8, 32, 4, integer=True), False),  # nothing is decoded
        (Layout(32, 4096, 4, 4096, 4), False),  # too long to be written out
    ],
)
def test_weights_that_are_decoded_are_asked_for_ahead(layout: Layout, ahead: bool) -> None:
    assert prefetches(layout) == ahead
    if not layout.integer:  # other layouts need a chip's instruction
        assert ("llvm.prefetch" in matmul(layout).script()) == ahead
