"""Kernels for narrower descriptors on this machine: right, and made of what these allow only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm")

from hal.descriptor import Descriptor
from hal.kernels import (
    arrange,
    attention,
    codes_convolution,
    convolution,
    convolution_plan,
    matmul,
    moe,
)
from hal.kernels import cache as cache_kernels
from hal.kernels.attention_plan import Attention
from hal.kernels.quantized_layout import Layout, byte_dot
from hal.targets import resolve
from tests import cache
from tests.kernels import test_codes_convolution
from tests.kernels.assembly import Allowed, Line, inner_loops, multiplications, names
from tests.kernels.support import (
    Chip,
    check,
    chip_of,
    compiled,
    device,
    prepared_code,
    product_code,
    runs_here,
)

NARROWED = {
    "no dot": ("x86-64-v4", "features = []"),
    "host without its dot": ("host", "features = []"),
    "host with 128 bits": ("host", "[vector]\nbits = 128\nregisters = 16"),
    "host with 256 bits": ("host", "[vector]\nbits = 256\nregisters = 16"),
}
"""Descriptors that claim less than another one: its name and what they say."""

CHIPS = ("x86-64", "x86-64-v3", "host", *NARROWED)


@pytest.fixture
def described(request: pytest.FixtureRequest, tmp_path: Path) -> Descriptor:
    """The descriptor of that name, if this machine can run its code."""
    parent, text = NARROWED.get(request.param, (request.param, ""))
    found = runs_here(parent)
    if found.family != "x86-64" and resolve("host").descriptor.family != "x86-64":
        pytest.skip("assembly is read for x86-64 only")
    if not text:
        return found
    file = tmp_path / "narrow.toml"
    file.write_text(f'schema = 1\nname = "narrow"\nextends = "{parent}"\n{text}\n')
    return resolve(str(file)).descriptor


@dataclasses.dataclass(frozen=True)
class On:
    """A chip and its descriptor."""

    descriptor: Descriptor
    chip: Chip

    def layout(self, bits: int, *, rounded: bool) -> Layout:
        """A layout with columns that fill no block, for a product as the backend makes it."""
        dot = self.chip.dot if rounded else None
        lanes = dot.lanes if dot else self.chip.lanes
        signed = dot is not None and dot.signed
        return Layout(3 * lanes + 1, 96, bits, 32, lanes, integer=dot is not None, signed=signed)


def quantized(on: On, bits: int, *, rounded: bool) -> list[str]:
    layout = on.layout(bits, rounded=rounded)
    check(layout, on.chip, 32 if rounded else 0)
    return [product_code(layout, on.chip).assembly]


def prepared(on: On) -> list[str]:
    layout = on.layout(4, rounded=True)
    check(layout, on.chip, 32)
    return [prepared_code(layout, on.chip, 32).assembly]


def float_matmul(on: On) -> list[str]:
    k, n = 40, 4 * on.chip.lanes
    code = compiled(matmul.row_major(k, n, on.chip.lanes, on.chip.registers), on.chip.target)
    rng = np.random.default_rng(0)
    w = rng.standard_normal((k, n), np.float32)
    for rows in (1, 3, 70):
        x = rng.standard_normal((rows, k), np.float32)
        out = device(np.full((rows, n), np.nan, np.float32))
        code.call(device(x), device(w), out)
        np.testing.assert_allclose(out.numpy(), x @ w, rtol=1e-4, atol=1e-4)
    return [code.assembly]


def scores(on: On) -> list[str]:
    rng = np.random.default_rng(1)
    size = 4 * on.chip.lanes
    q = rng.standard_normal((2, 4, 3, size), np.float32)
    k = rng.standard_normal((2, 2, 5, size), np.float32)
    out = device(np.zeros((2, 4, 3, 5), np.float32))
    code = compiled(attention.scores(4, 2, size, on.chip.lanes, 0.5), on.chip.target)
    code.call(device(q), device(k), out)
    expected = 0.5 * q @ np.repeat(k, 2, 1).swapaxes(2, 3)
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-4, atol=1e-4)
    return [code.assembly]


def cached(on: On, bits: int) -> list[str]:
    p = cache.problem(page=40, channels=4 * on.chip.lanes)
    write = compiled(cache_kernels.write(2, 4 * on.chip.lanes, "float32"), on.chip.target)
    pool = device(p["keys"])
    write.call(pool, *(device(p[name]) for name in ("k", "table", "lengths")))
    np.testing.assert_array_equal(
        pool.numpy(), cache.write(p["keys"], p["k"], p["table"], p["lengths"])
    )
    fixed = {name: p[name] for name in ("q", "keys", "values", "table", "lengths")}
    settings: dict[str, int] = {"bits": bits, "block": 16} if bits else {}
    if bits:
        for name, scales in (("keys", "ks"), ("values", "vs")):
            p[name], p[scales], fixed[name] = cache.quantized(p[name], **settings)
    expected = cache.attend(**fixed, scale=0.25)
    spec = Attention(
        4, 2, 4 * on.chip.lanes, 4 * on.chip.lanes, 0.25, lanes=on.chip.lanes, **settings
    )
    none = np.zeros((1, 1, 1, 1), np.float16)
    arguments = [p[name] for name in ("q", "keys", "values", "table", "lengths")]
    arguments += [p.get("ks", none), p.get("vs", none)]
    out, sums = (
        device(np.zeros(expected.shape, np.float32)),
        device(np.zeros((1, 1, 1), np.float32)),
    )
    attend = compiled(cache_kernels.attention(spec), on.chip.target)
    attend.call(*map(device, arguments), out, sums)
    np.testing.assert_allclose(out.numpy(), expected, atol=2e-5)
    return [attend.assembly, write.assembly]


def experts(on: On) -> list[str]:
    rng = np.random.default_rng(2)
    count, choices, hidden, inner = 5, 2, 2 * on.chip.lanes, 4 * on.chip.lanes
    x = rng.standard_normal((3, hidden), np.float32)
    index = rng.integers(0, count, (3, choices))
    weight = rng.random((3, choices), np.float32)
    wide = rng.standard_normal((count, 2 * inner, hidden), np.float32)
    back = rng.standard_normal((count, hidden, inner), np.float32)
    h, y = device(np.zeros((3, choices, inner), np.float32)), device(np.zeros_like(x))
    lanes, target = on.chip.lanes, on.chip.target
    up = compiled(moe.gate_up(count, hidden, inner, choices, lanes, "relu"), target)
    down = compiled(moe.down(count, hidden, inner, choices, lanes), target)
    up.call(device(x), device(index), device(wide), h)
    down.call(h, device(index), device(weight), device(back), y)
    gate, other = np.split(np.einsum("tkoh,th->tko", wide[index], x), 2, axis=-1)
    expected = np.einsum("tk,tkhi,tki->th", weight, back[index], np.maximum(gate, 0) * other)
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-4, atol=1e-3)
    return [up.assembly, down.assembly]


def convolved(on: On) -> list[str]:
    sizes = convolution_plan.Geometry(
        3, 5, 1, (9, 2 * on.chip.lanes + 5), (3, 3), pads=(1, 1, 1, 1)
    )
    made = convolution_plan.plan(sizes, on.chip.lanes, on.chip.registers)
    assert made is not None
    rng = np.random.default_rng(3)
    x = rng.standard_normal((2, 3, *sizes.size), np.float32)
    w = rng.standard_normal((5, 3, 3, 3), np.float32)
    bias = rng.standard_normal(5, np.float32)
    z = device(np.zeros((2, 3, made.arranged.extent), np.float32))
    out = device(np.zeros((2, 5, sizes.out[0] * sizes.out[1]), np.float32))
    first = compiled(arrange.arrange(made), on.chip.target)
    then = compiled(convolution.convolution(made, 2, convolution.Floats(low=0.0)), on.chip.target)
    first.call(device(x), z)
    then.call(z, device(convolution_plan.pack(w, made)), device(bias), out)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    expected = np.einsum("bcyxij,ocij->boyx", windows, w) + bias[:, None, None]
    got = out.numpy().reshape(expected.shape)
    np.testing.assert_allclose(got, np.maximum(expected, 0), rtol=1e-4, atol=1e-4)
    return [then.assembly, first.assembly]


def convolved_codes(on: On) -> list[str]:
    if on.chip.dot is None:
        pytest.skip("codes are convolved where there is a dot product of bytes")
    sizes = convolution_plan.Geometry(
        5, 7, 1, (9, 2 * on.chip.dot.lanes + 5), (3, 3), pads=(1, 1, 1, 1)
    )
    made = codes_convolution.plan(sizes, on.chip.dot, on.chip.registers)
    assert made is not None
    x, w, factor, bias = test_codes_convolution.drawn(sizes, 2)
    out = codes_convolution.Rounding(1.0, 77)
    terms = codes_convolution.Codes(on.chip.dot, test_codes_convolution.X, out)
    got = test_codes_convolution.computed(made, terms, on.chip, x, w, factor, bias)
    value = test_codes_convolution.sums(sizes, x, w) * factor[:, None] + bias[:, None]
    assert np.abs(got - np.clip(value + 77, 0, 255)).max() < 0.502
    return [compiled(convolution.convolution(made, 2, terms), on.chip.target).assembly]


KERNELS: dict[str, Callable[[On], list[str]]] = {
    "quantized, 4 bits by rounded": lambda on: quantized(on, 4, rounded=True),
    "quantized, 8 bits by rounded": lambda on: quantized(on, 8, rounded=True),
    "quantized, 3 bits by float": lambda on: quantized(on, 3, rounded=False),
    "prepared activations": prepared,
    "float": float_matmul,
    "scores": scores,
    "cached attention": lambda on: cached(on, 0),
    "cached attention, 8 bits": lambda on: cached(on, 8),
    "experts": experts,
    "convolution": convolved,
    "convolution of codes": convolved_codes,
}
"""Each runs on the chip, checks its results against NumPy, and gives the assembly."""

PRODUCTS = {
    "quantized, 4 bits by rounded": 32,
    "quantized, 8 bits by rounded": 32,
    "quantized, 3 bits by float": 32,
    "float": 4,
    "cached attention": 4,
    "cached attention, 8 bits": 4,
    "experts": 4,
    "convolution": 9,
    "convolution of codes": 36,
}
"""Multiplications that an inner loop has at least. Scaling sums takes fewer; that of scores is
unrolled, and activations are prepared without any."""


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("described", CHIPS, indirect=True)
def test_a_kernel_is_right_and_uses_only_what_its_descriptor_allows(
    described: Descriptor, kernel: str
) -> None:
    on, allowed = On(described, chip_of(described)), Allowed.by(described)
    texts = KERNELS[kernel](on)
    for text in texts:
        found = allowed.violations(text)
        assert not found, (names(found), found[:5])
    integer = ("by rounded" in kernel or "of codes" in kernel) and on.chip.dot is not None
    if kernel in PRODUCTS:
        assert multiplications(texts[0], allowed, integer=integer) >= PRODUCTS[kernel]


@pytest.mark.parametrize("described", ["host"], indirect=True)
def test_the_check_bites_on_code_for_a_wider_chip(described: Descriptor) -> None:
    if byte_dot(described) is None or described.vector.bits < 512:
        pytest.skip("this machine has nothing that a narrower chip lacks")
    on = On(described, chip_of(described))
    (text,) = quantized(on, 4, rounded=True)
    for name, seen in (
        ("x86-64", "vpdpbusd"),
        ("x86-64-v3", "vpdpbusd"),
        ("x86-64-v4", "vpdpbusd"),
    ):
        allowed = Allowed.by(resolve(name).descriptor)
        assert seen in names(allowed.violations(text))
        assert multiplications(text, allowed) < PRODUCTS["quantized, 4 bits by rounded"]
    (text,) = float_matmul(on)
    assert Allowed.by(resolve("x86-64-v3").descriptor).violations(text)
    assert not Allowed.by(resolve("x86-64-v4").descriptor).violations(text)


def test_assembly_is_read_line_by_line() -> None:
    text = """
\t.text
outer:                      # a loop around
.L1:
\tvmovups (%rax), %ymm0
.L2:
\t{vex}\tvpdpbusd (%rdx), %ymm1, %ymm0  # the inner one
\taddq $1, %rcx
\tjne .L2
\tjmp .L1
\tretq
"""
    (loop,) = inner_loops(text)
    assert [line.mnemonic for line in loop[1:]] == ["vpdpbusd", "addq"]
    assert Line("vpaddd (%rax){1to8}, %ymm17, %ymm3").width == 256
    wide = Allowed(256, dot=False, bfloat=False, fused=False)
    assert names(wide.violations(text)) == {"vpdpbusd"}
    assert names(dataclasses.replace(wide, bits=128, dot=True).violations(text)) == {
        "vmovups",
        "vpdpbusd",
    }
    assert wide.violations("\tvpaddd %ymm17, %ymm1, %ymm2")  # a register of 512-bit chips
