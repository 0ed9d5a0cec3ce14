"""Convolutions and maxima of codes against NumPy, with vectors of three widths."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tvm")

from hal.kernels.arrange import arrange
from hal.kernels.codes_convolution import (
    PER_WORD,
    Codes,
    Largest,
    Rounding,
    SeparateCodes,
    largest_plan,
    pack,
    padded,
    plan,
    starts,
    word_of,
)
from hal.kernels.convolution import convolution, tasks
from hal.kernels.convolution_plan import Geometry, Plan
from hal.kernels.quantized_layout import Dot
from tests.kernels.support import Chip, chip, compiled, device
from tests.kernels.test_convolution import reference

X = Rounding(0.02, 122)


def on_lanes(lanes: int) -> Chip:
    """This machine with its dot product of bytes in vectors of so many words."""
    on = chip("host")
    if on.dot is None or "vpdpbusd" not in on.dot.llvm or on.dot.lanes < lanes:
        pytest.skip("this machine has no such dot product")
    family = "avx512" if on.dot.lanes == 16 or ".avx512." in on.dot.llvm else "avx"
    return dataclasses.replace(on, dot=Dot(f"llvm.x86.{family}.vpdpbusd.{32 * lanes}", lanes))


def words_of(codes: np.ndarray) -> np.ndarray:
    """``[B, C, H, W]`` as words ``[B, C / 4, H * W]``."""
    images, channels, height, width = codes.shape
    codes = np.pad(codes, ((0, 0), (0, -channels % PER_WORD), (0, 0), (0, 0)))
    split = codes.reshape(images, -(-channels // PER_WORD), PER_WORD, height * width).transpose(
        0, 1, 3, 2
    )
    return np.ascontiguousarray(split).view(np.int32)[..., 0]


def codes_of(words: np.ndarray, channels: int) -> np.ndarray:
    """Words ``[B, C / 4, pixels]`` as ``[B, C, pixels]``."""
    images, count, pixels = words.shape
    split = np.ascontiguousarray(words).view(np.uint8).reshape(images, count, pixels, PER_WORD)
    return split.transpose(0, 1, 3, 2).reshape(images, count * PER_WORD, pixels)[:, :channels]


def arranged(made: Plan, terms: Codes | Largest, words: np.ndarray, on: Chip) -> object:
    g, to = made.geometry, made.arranged
    if to.as_given:
        return device(words.reshape(len(words), g.channels, to.extent))
    z = device(np.full((len(words), g.channels, to.extent), -1, np.int32))
    code = arrange(made, terms.dtype, terms.border)
    compiled(code, on.target).call(device(words.reshape(len(words), g.channels, *g.size)), z)
    return z


def computed(
    made: Plan, terms: Codes, on: Chip, x: np.ndarray, w: np.ndarray, factor: np.ndarray,
    bias: np.ndarray, residual: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """What the kernel stores: codes, or floats."""
    assert on.dot is not None
    g, outputs = made.geometry, len(w)
    each = [np.pad(v, (0, padded(made) - outputs)) for v in (factor, bias)]
    shape = [len(x), g.outputs // (PER_WORD if terms.out else 1), g.out[0] * g.out[1]]
    out = device(np.full(shape, -1, np.int32 if terms.out else np.float32))
    operands = [arranged(made, terms, words_of(x), on), device(pack(w, made))]
    operands += [device(starts(w, terms.x.zero, made, on.dot)), *(device(v) for v in each)]
    operands += [] if residual is None else [device(words_of(residual))]
    compiled(convolution(made, 2, terms), on.target).call(*operands, out)
    return codes_of(out.numpy(), outputs) if terms.out else out.numpy()[:, :outputs]


def drawn(g: Geometry, images: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Codes, weights, factors, biases."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (images, g.channels, *g.size)).astype(np.uint8)
    w = rng.integers(-128, 128, (g.outputs, g.channels, *g.window)).astype(np.int8)
    factor = rng.uniform(0.5, 1, g.outputs).astype(np.float32) / (8 * g.channels * g.taps)
    return x, w, factor, rng.uniform(-9, 9, g.outputs).astype(np.float32)


def sums(g: Geometry, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Exact ones, the border being the zero point."""
    return reference(g, x.astype(np.float64) - X.zero, w)


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    window = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    return Geometry(
        channels=draw(st.integers(1, 9)),
        outputs=draw(st.integers(1, 21)),
        groups=1,
        size=draw(st.tuples(st.integers(7, 19), st.integers(7, 40))),
        window=window,
        strides=draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        dilations=draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        pads=draw(st.tuples(*[st.integers(0, 2)] * 4)),
    )


@pytest.mark.parametrize("lanes", [4, 8, 16])
@settings(max_examples=8, deadline=None)
@given(g=geometries(), images=st.integers(0, 2))
def test_codes_are_those_of_exact_sums(lanes: int, g: Geometry, images: int) -> None:
    on = on_lanes(lanes)
    assert on.dot is not None
    made = plan(g, on.dot, on.registers)
    if made is None:
        assert g.out[0] * g.out[1] < lanes or g.out[1] < lanes
        return
    x, w, factor, bias = drawn(g, images)
    value = sums(g, x, w) * factor[:, None] + bias[:, None]
    got = computed(made, Codes(on.dot, X, Rounding(1.0, 77)), on, x, w, factor, bias)
    assert np.abs(got - np.clip(value + 77, 0, 255)).max(initial=0) < 0.502  # rounded, in float32
    got = computed(made, Codes(on.dot, X, None, low=-1.0, high=4.0), on, x, w, factor, bias)
    np.testing.assert_allclose(got, np.clip(value, -1, 4), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 16), (7, 7), (9, 35)])
@pytest.mark.parametrize("middle", [Rounding(0.5, 100), None])
def test_a_residual_is_added_in_the_scale_of_the_result(
    size: tuple[int, int], middle: Rounding | None
) -> None:
    on = on_lanes(16)
    assert on.dot is not None
    g = Geometry(6, 18, 1, size, (3, 3), pads=(1, 1, 1, 1))
    made = plan(g, on.dot, on.registers)
    assert made is not None
    x, w, factor, bias = drawn(g, 2)
    other = np.random.default_rng(1).integers(0, 256, (2, 18, *size)).astype(np.uint8)
    out, residual = Rounding(0.25, 9), Rounding(0.125, 130)
    value = sums(g, x, w) * factor[:, None].astype(np.float64) + bias[:, None]  # in units
    unit = (middle or out).scale
    if middle is not None:
        value = np.clip(np.rint(value), -middle.zero, 255 - middle.zero)
    value = value * unit + residual.scale * (other.reshape(2, 18, -1).astype(float) - residual.zero)
    terms = Codes(on.dot, X, out, middle, residual, low=0.0)
    got = computed(made, terms, on, x, w, factor, bias, other)
    expected = np.clip(np.maximum(value, 0) / out.scale + out.zero, 0, 255)
    # A sum within float32's error of two codes may be rounded to either, in the middle as well.
    wrong = np.abs(got - expected) > 0.502
    assert wrong.mean() < 1e-3
    assert np.abs(got - expected).max() < 0.502 + (middle.scale / out.scale if middle else 0)


@pytest.mark.parametrize("lanes", [4, 16])
@pytest.mark.parametrize("size", [(112, 112), (9, 20)])
def test_the_largest_of_windows_is_that_of_each_byte(lanes: int, size: tuple[int, int]) -> None:
    on = on_lanes(lanes)
    assert on.dot is not None
    g = Geometry(3, 3, 3, size, (3, 3), (2, 2), pads=(1, 1, 1, 1))
    made = largest_plan(g, on.dot, on.registers)
    if made is None:
        assert g.out[1] * g.out[0] < lanes or g.out[1] < lanes
        return
    x = np.random.default_rng(0).integers(0, 256, (2, 12, *size)).astype(np.uint8)
    terms = Largest(on.dot)
    words = words_of(x)
    out = device(np.full((2, 3, g.out[0] * g.out[1]), -1, np.int32))
    room = [device(np.zeros((2 * tasks(made, 2), 1, made.arranged.extent), np.int32))]
    z = device(words.reshape(2, 3, *size)) if made.alone else arranged(made, terms, words, on)
    arguments = [z, out, *(room if made.alone else [])]
    compiled(convolution(made, 2, terms), on.target).call(*arguments)
    wide = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    view = np.lib.stride_tricks.sliding_window_view(wide, (3, 3), (2, 3))[:, :, ::2, ::2]
    expected = view.max((-2, -1)).reshape(2, 12, -1)
    np.testing.assert_array_equal(codes_of(out.numpy(), 12), expected)


def test_signed_bytes_are_codes_less_128() -> None:
    signed, unsigned = Dot("any", 4, signed=True), Dot("any", 4)
    assert np.array([word_of(130, signed)], np.int32).view(np.int8).tolist() == [2] * 4
    assert np.array([word_of(130, unsigned)], np.int32).view(np.uint8).tolist() == [130] * 4
    g = Geometry(4, 4, 1, (4, 4), (1, 1))
    made = plan(g, unsigned, 16)
    assert made is not None
    w = np.arange(16, dtype=np.int8).reshape(4, 4, 1, 1)
    codes = np.array([7, 200, 0, 255])
    for dot, stored in ((signed, codes - 128), (unsigned, codes)):
        exact = (w.reshape(4, 4) * (codes - 122)).sum(1)
        given_ = (w.reshape(4, 4).astype(int) * stored).sum(1) + starts(w, 122, made, dot)[:4]
        assert given_.tolist() == exact.tolist()


def test_groups_and_small_maps_have_no_kernel() -> None:
    dot = Dot("any", 16)
    assert plan(Geometry(8, 8, 2, (14, 14), (3, 3)), dot, 32) is None
    assert plan(Geometry(8, 8, 1, (3, 3), (1, 1)), dot, 32) is None
    made = plan(Geometry(8, 6, 1, (14, 14), (3, 3)), dot, 32)
    assert made is not None
    assert (made.geometry.channels, made.geometry.outputs, made.height % PER_WORD) == (2, 8, 0)


@pytest.mark.parametrize("lanes", [4, 16])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
@pytest.mark.parametrize("size", [(7, 7), (28, 28), (9, 50)])
def test_channels_by_themselves_are_exact(
    lanes: int, strides: tuple[int, int], size: tuple[int, int]
) -> None:
    on = on_lanes(lanes)
    assert on.dot is not None
    g = Geometry(10, 10, 10, size, (3, 3), strides, pads=(1, 1, 1, 1))
    made = plan(g, on.dot, on.registers)
    if made is None:
        assert g.out[0] * g.out[1] < 3 * lanes
        return
    x, w, factor, bias = drawn(dataclasses.replace(g, channels=10), 2)
    w = w[:, :1]
    terms = SeparateCodes(on.dot, X, Rounding(1.0, 77), low=0.0)
    each = [np.pad(v, (0, padded(made) - 10)) for v in (starts(w, 122, made, on.dot)[:10],)]
    each += [np.pad(v, (0, padded(made) - 10)) for v in (factor, bias)]
    out = device(np.full((2, 3, g.out[0] * g.out[1]), -1, np.int32))
    room = device(np.full((2 * tasks(made, 2), PER_WORD, made.arranged.extent), np.nan, np.float32))
    words = device(words_of(x).reshape(2, 3, *size))
    code = compiled(convolution(made, 2, terms), on.target)
    code.call(words, device(pack(w, made)), *(device(v) for v in each), out, room)
    value = np.maximum(sums(g, x, w) * factor[:, None] + bias[:, None], 0)
    assert np.abs(codes_of(out.numpy(), 10) - np.clip(value + 77, 0, 255)).max() < 0.502
