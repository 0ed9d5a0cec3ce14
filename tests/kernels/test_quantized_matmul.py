"""Products with quantized weights against dequantized ones, on the host and on narrower chips."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

tvm = pytest.importorskip("tvm")

from hal.kernels.prepare_activations import prepare  # noqa: E402
from hal.kernels.quantized_layout import (  # noqa: E402
    Dot,
    Layout,
    byte_dot,
    dequantized,
    pack,
    rounded,
)
from hal.kernels.quantized_matmul import matmul, rows_per_block  # noqa: E402
from hal.targets import resolve  # noqa: E402
from hal.targets.tvm.target import tvm_target  # noqa: E402

ROWS = (1, 3, 70)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a kernel is shaped by, and the TVM target that it is compiled for."""

    lanes: int
    registers: int
    dot: Dot | None
    target: Any


@functools.cache
def chip(name: str) -> Chip:
    if name == "narrow":
        return Chip(4, 16, None, {"kind": "llvm"})
    descriptor = resolve(name).descriptor
    registers = descriptor.vector.registers or 16
    lanes = max(4, descriptor.vector_lanes("float32"))
    return Chip(lanes, registers, byte_dot(descriptor), tvm_target(descriptor))


def compiled(kernel: Any, target: Any) -> Any:
    module = tvm.IRModule({"kernel": kernel.with_attr("global_symbol", "kernel")})
    return tvm.compile(module, target=tvm.target.Target(dict(target)))["kernel"]


@dataclasses.dataclass(frozen=True)
class Weights:
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None

    @classmethod
    def random(cls, layout: Layout) -> Weights:
        rng = np.random.default_rng(layout.n * 31 + layout.k)
        half = 1 << (layout.bits - 1)
        low = 0 if layout.zeros else -half
        codes = rng.integers(low, low + 2 * half, (layout.n, layout.k))
        scales = rng.standard_normal((layout.n, layout.groups)).astype(np.float16)
        scales[0, 0] = 3e-6  # subnormal in float16
        shape = (layout.n, layout.groups)
        zeros = rng.integers(0, 2 * half, shape).astype(np.uint8) if layout.zeros else None
        return cls(codes.astype(np.uint8 if layout.zeros else np.int8), scales, zeros)


def run(layout: Layout, on: Chip, weights: Weights, x: np.ndarray, block: int) -> np.ndarray:
    rows = len(x)
    if layout.integer:
        kinds = [(layout.padded_k, np.int8), (layout.groups, np.float32), (layout.groups, np.int32)]
    else:
        kinds = [(layout.padded_k, np.float32), (layout.groups, np.float32)]
    prepared = [tvm.runtime.tensor(np.full((rows, n), 3, kind)) for n, kind in kinds]
    _prepared(layout, on, block)(tvm.runtime.tensor(x), *prepared)
    out = tvm.runtime.tensor(np.full((rows, layout.padded_n), np.nan, np.float32))
    packed = tvm.runtime.tensor(pack(layout, weights.codes, weights.scales, weights.zeros))
    _product(layout, on)(packed, *prepared, out)
    return out.numpy()[:, : layout.n]


# Not cached: hypothesis draws other shapes every time, but rows of one test share the code.
def _prepared(layout: Layout, on: Chip, block: int) -> Any:
    return _cached(("prepare", layout, on.lanes, block), lambda: prepare(layout, block), on)


def _product(layout: Layout, on: Chip) -> Any:
    return _cached(("matmul", layout, on.lanes), lambda: matmul(layout, on.registers, on.dot), on)


_CODE: dict[Any, Any] = {}


def _cached(key: Any, make: Any, on: Chip) -> Any:
    if key not in _CODE:
        _CODE[key] = compiled(make(), on.target)
    return _CODE[key]


def check(layout: Layout, on: Chip, block: int) -> None:
    weights = Weights.random(layout)
    w = dequantized(weights.codes, weights.scales, weights.zeros, layout.group)
    for rows in ROWS:
        x = np.random.default_rng(rows).standard_normal((rows, layout.k), np.float32)
        x[0, : layout.group] = 0  # a block of zeros has no scale
        got = run(layout, on, weights, x, block)
        exact = rounded(x, block) if block else x
        expected = exact.astype(np.float64) @ w.T.astype(np.float64)
        size = np.abs(exact).astype(np.float64) @ np.abs(w).T
        worst = float(np.max(np.abs(got - expected) / np.maximum(size, 1e-6)))
        assert worst < 2e-6 if layout.bits < 8 else 1e-5, (layout, rows, worst)


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
