"""Convolutions against a sum over the taps in NumPy, on chips with different vectors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tvm")

from hal.kernels.arrange import arrange
from hal.kernels.convolution import Floats, convolution, tasks
from hal.kernels.convolution_plan import Geometry, Plan, pack, plan
from tests.kernels.support import Chip, chip, compiled, device, runs_here


def reference(g: Geometry, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    top, left, bottom, right = g.pads
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right))).astype(np.float64)
    (rows, columns), (sh, sw), (dh, dw) = g.out, g.strides, g.dilations
    split = padded.reshape(len(x), g.groups, g.depth, *padded.shape[2:])
    weights = w.reshape(g.groups, -1, *w.shape[1:]).astype(np.float64)
    out = np.zeros((len(x), g.groups, g.outputs // g.groups, rows, columns))
    for i in range(g.window[0]):
        for j in range(g.window[1]):
            rows_of = slice(i * dh, i * dh + (rows - 1) * sh + 1, sh)
            columns_of = slice(j * dw, j * dw + (columns - 1) * sw + 1, sw)
            part = split[:, :, :, rows_of, columns_of]
            out += np.einsum("bgdyx,gmd->bgmyx", part, weights[..., i, j])
    return out.reshape(len(x), g.outputs, rows * columns)


def computed(
    made: Plan,
    on: Chip,
    x: np.ndarray,
    w: np.ndarray,
    bias: np.ndarray,
    residual: np.ndarray | None = None,
    low: float | None = None,
    high: float | None = None,
) -> np.ndarray:
    g, to = made.geometry, made.arranged
    more = [] if residual is None else [device(residual)]
    terms = Floats(residual=residual is not None, low=low, high=high)
    kernel = convolution(made, 2, terms)
    room = []
    if made.alone:
        z, count = device(x), len(x) * tasks(made, 2)
        room = [device(np.full((count, 1, to.extent), np.nan, np.float32))]
    elif to.as_given:
        z = device(x.reshape(len(x), g.channels, to.extent))
    else:
        z = device(np.full((len(x), g.channels, to.extent), np.nan, np.float32))
        compiled(arrange(made), on.target).call(device(x), z)
    out = device(np.full((len(x), g.outputs, g.out[0] * g.out[1]), np.nan, np.float32))
    arguments = [z, device(pack(w, made)), device(bias), *more, out, *room]
    compiled(kernel, on.target).call(*arguments)
    return out.numpy()


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    groups = draw(st.sampled_from([1, 1, 2, 5]))
    window = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dilations = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    return Geometry(
        channels=groups * draw(st.integers(1, 4)),
        outputs=groups * draw(st.integers(1, 9)),
        groups=groups,
        size=draw(st.tuples(st.integers(7, 19), st.integers(7, 40))),
        window=window,
        strides=draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        dilations=dilations,
        pads=draw(st.tuples(*[st.integers(0, 2)] * 4)),
    )


@pytest.mark.parametrize("name", ["narrow", "x86-64-v3", "host"])
@settings(max_examples=12, deadline=None)
@given(g=geometries(), images=st.integers(0, 2))
def test_a_convolution_equals_numpys(name: str, g: Geometry, images: int) -> None:
    if name != "narrow":
        runs_here(name)
    on = chip(name)
    made = plan(g, on.lanes, on.registers)
    if made is None:
        assert g.out[0] * g.out[1] < 4 or g.out[1] < 4
        return
    rng = np.random.default_rng(0)
    x = rng.standard_normal((images, g.channels, *g.size)).astype(np.float32)
    w = rng.standard_normal((g.outputs, g.depth, *g.window)).astype(np.float32)
    bias = rng.standard_normal(g.outputs).astype(np.float32)
    got = computed(made, on, x, w, bias)
    expected = reference(g, x, w) + bias[:, None]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(14, 14), (9, 56)])
def test_what_follows_is_done_before_a_result_is_stored(size: tuple[int, int]) -> None:
    on = chip("narrow")
    made = plan(Geometry(3, 10, 1, size, (3, 3), pads=(1, 1, 1, 1)), on.lanes, on.registers)
    assert made is not None
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 3, *size)).astype(np.float32)
    w = rng.standard_normal((10, 3, 3, 3)).astype(np.float32)
    bias = rng.standard_normal(10).astype(np.float32)
    residual = rng.standard_normal((2, 10, size[0] * size[1])).astype(np.float32)
    plain = reference(made.geometry, x, w) + bias[:, None] + residual
    got = computed(made, on, x, w, bias, residual, 0.0, 2.5)
    np.testing.assert_allclose(got, np.clip(plain, 0, 2.5), rtol=1e-4, atol=1e-4)
    got = computed(made, on, x, w, bias, residual, low=0.0)
    np.testing.assert_allclose(got, np.maximum(plain, 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("geometry", "as_given", "planes", "runs"),
    [
        (Geometry(8, 8, 1, (56, 56), (1, 1)), True, 1, 14),
        (Geometry(8, 8, 1, (56, 56), (3, 3), pads=(1, 1, 1, 1)), False, 1, 56),
        (Geometry(8, 8, 1, (56, 56), (3, 3), (2, 2), pads=(1, 1, 1, 1)), False, 6, 4),
        (Geometry(8, 8, 1, (56, 56), (1, 1), (2, 2)), False, 1, 4),
        (Geometry(8, 8, 1, (7, 7), (3, 3), pads=(1, 1, 1, 1)), False, 3, 1),
    ],
)
def test_inputs_are_moved_only_where_vectors_need_it(
    geometry: Geometry, as_given: bool, planes: int, runs: int
) -> None:
    made = plan(geometry, 16, 32)
    assert made is not None
    arranged = made.arranged
    assert (arranged.as_given, len(arranged.planes), arranged.runs) == (as_given, planes, runs)
    assert made.height * made.wide + made.wide < 32


def test_maps_of_a_few_elements_and_large_windows_have_no_kernel() -> None:
    assert plan(Geometry(8, 8, 1, (1, 1), (1, 1)), 16, 32) is None
    assert plan(Geometry(8, 8, 1, (40, 40), (12, 12)), 16, 32) is None
    smaller = plan(Geometry(8, 8, 1, (2, 3), (1, 1)), 16, 32)
    assert smaller is not None
    assert smaller.lanes == 4
