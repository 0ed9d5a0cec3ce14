"""Winograd's method against plain sums in NumPy."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("tvm")

from hal.kernels import winograd
from hal.kernels.arrange import arrange
from hal.kernels.convolution import Floats, convolution
from hal.kernels.convolution_plan import Geometry
from tests.kernels.support import chip, compiled, device, runs_here
from tests.kernels.test_convolution import reference


@pytest.mark.parametrize("name", ["narrow", "x86-64-v3", "host"])
@pytest.mark.parametrize(
    ("size", "pads"),
    [
        ((56, 56), (1, 1, 1, 1)),
        ((13, 28), (1, 1, 1, 1)),
        ((7, 7), (1, 1, 1, 1)),
        ((9, 35), (0, 1, 2, 0)),
        ((15, 16), (0, 0, 0, 0)),
    ],
)
@pytest.mark.parametrize("follows", [False, True])
def test_tiles_give_what_plain_sums_give(
    name: str, size: tuple[int, int], pads: tuple[int, int, int, int], follows: bool
) -> None:
    if name != "narrow":
        runs_here(name)
    on = chip(name)
    g = Geometry(64, 72, 1, size, (3, 3), pads=pads)
    made = winograd.plan(g, on.lanes, on.registers)
    assert made is not None
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, g.channels, *size)).astype(np.float32)
    w = rng.standard_normal((g.outputs, g.channels, 3, 3)).astype(np.float32)
    bias = rng.standard_normal(g.outputs).astype(np.float32)
    pixels = g.out[0] * g.out[1]
    residual = rng.standard_normal((2, g.outputs, pixels)).astype(np.float32)
    expected = reference(g, x, w) + bias[:, None]
    if follows:
        expected = np.clip(expected + residual, 0, 9)

    def empty(*shape: int) -> object:
        return device(np.full(shape, np.nan, np.float32))

    z = empty(2, g.channels, made.arranged.arranged.extent)
    compiled(arrange(made.arranged), on.target).call(device(x), z)
    v = empty(2, 16 * g.channels, made.count)
    compiled(winograd.scatter(made), on.target).call(z, v)
    u = empty(2, 16 * g.outputs, made.count)
    products = compiled(convolution(made.products, 2, Floats(bias=False)), on.target)
    products.call(v, device(winograd.pack(w, made)), u)
    out = empty(2, g.outputs, pixels)
    limits = {"residual": True, "low": 0.0, "high": 9.0} if follows else {}
    more = [device(residual)] if follows else []
    compiled(winograd.gather(made, **limits), on.target).call(u, device(bias), *more, out)
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(64, 64, 1, (56, 56), (5, 5)),
        Geometry(64, 64, 1, (56, 56), (3, 3), (2, 2)),
        Geometry(64, 64, 1, (56, 56), (3, 3), dilations=(2, 2)),
        Geometry(64, 64, 64, (56, 56), (3, 3)),
        Geometry(3, 32, 1, (56, 56), (3, 3)),
    ],
)
def test_other_windows_and_few_channels_are_summed_plainly(geometry: Geometry) -> None:
    assert winograd.plan(geometry, 16, 32) is None
