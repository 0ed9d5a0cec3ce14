"""What tests of kernels share: chips, compiling for them, and the product with quantized weights."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import tvm

from hal.descriptor import Descriptor
from hal.kernels.prepare_activations import prepare
from hal.kernels.quantized_layout import Dot, Layout, byte_dot, dequantized, pack, rounded
from hal.kernels.quantized_matmul import matmul
from hal.targets import resolve
from hal.targets.detect import detect
from hal.targets.tvm.target import tvm_target

ROWS = (1, 3, 70)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a kernel is shaped by, and the TVM target that it is compiled for."""

    lanes: int
    registers: int
    dot: Dot | None
    target: Any


NARROW = Chip(4, 16, None, {"kind": "llvm"})


@functools.cache
def chip(name: str) -> Chip:
    """A target of the library or ``host``; ``narrow`` is the least that runs here."""
    return NARROW if name == "narrow" else chip_of(resolve(name).descriptor)


def chip_of(descriptor: Descriptor) -> Chip:
    """The chip as the backend sees it."""
    lanes = max(4, descriptor.vector_lanes("float32"))
    registers = descriptor.vector.registers or 16
    return Chip(lanes, registers, byte_dot(descriptor), tvm_target(descriptor))


def runs_here(name: str) -> Descriptor:
    """The descriptor of that name; skips the test where this machine is not such a chip."""
    descriptor, machine = resolve(name).descriptor, detect()
    match = descriptor.match
    if match is not None:
        if match.machine and machine.architecture not in match.machine:
            pytest.skip(f"{name} code does not run on {machine.architecture}")
        missing = sorted(set(match.features) - machine.features)
        if missing:
            pytest.skip(f"this machine lacks {', '.join(missing)}")
    return descriptor


@dataclasses.dataclass(frozen=True)
class Code:
    """A compiled kernel and its assembly."""

    call: Any
    assembly: str


_CODE: dict[Any, Code] = {}


def compiled(kernel: Any, target: Any) -> Code:
    """The kernel for a target; hypothesis draws other shapes every time, but rows share the code."""
    key = (kernel, repr(target))
    if key not in _CODE:
        module = tvm.IRModule({"kernel": kernel.with_attr("global_symbol", "kernel")})
        built = tvm.compile(module, target=tvm.target.Target(dict(target)))
        _CODE[key] = Code(built["kernel"], built.mod.inspect_source("asm"))
    return _CODE[key]


def device(array: np.ndarray) -> Any:
    """A tensor with a copy of the array."""
    return tvm.runtime.tensor(np.ascontiguousarray(array))


@dataclasses.dataclass(frozen=True)
class Weights:
    """Random codes with their scales and zero points."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None

    @classmethod
    def random(cls, layout: Layout) -> Weights:
        """Codes of every value; one scale is subnormal in float16."""
        rng = np.random.default_rng(layout.n * 31 + layout.k)
        half = 1 << (layout.bits - 1)
        low = 0 if layout.zeros else -half
        codes = rng.integers(low, low + 2 * half, (layout.n, layout.k))
        scales = rng.standard_normal((layout.n, layout.groups)).astype(np.float16)
        scales[0, 0] = 3e-6
        shape = (layout.n, layout.groups)
        zeros = rng.integers(0, 2 * half, shape).astype(np.uint8) if layout.zeros else None
        return cls(codes.astype(np.uint8 if layout.zeros else np.int8), scales, zeros)


def prepared_code(layout: Layout, on: Chip, block: int) -> Code:
    """The kernel that prepares activations."""
    return compiled(prepare(layout, block), on.target)


def product_code(layout: Layout, on: Chip) -> Code:
    """The kernel of the product."""
    return compiled(matmul(layout, on.registers, on.dot if layout.integer else None), on.target)


def run(layout: Layout, on: Chip, weights: Weights, x: np.ndarray, block: int) -> np.ndarray:
    """``x @ wᵀ`` by both kernels."""
    rows = len(x)
    if layout.integer:
        kinds = [(layout.padded_k, np.int8), (layout.groups, np.float32), (layout.groups, np.int32)]
    else:
        kinds = [(layout.padded_k, np.float32), (layout.groups, np.float32)]
    prepared = [device(np.full((rows, n), 3, kind)) for n, kind in kinds]
    prepared_code(layout, on, block).call(device(x), *prepared)
    out = device(np.full((rows, layout.padded_n), np.nan, np.float32))
    packed = device(pack(layout, weights.codes, weights.scales, weights.zeros))
    product_code(layout, on).call(packed, *prepared, out)
    return out.numpy()[:, : layout.n]


def check(layout: Layout, on: Chip, block: int) -> None:
    """The product against one with dequantized weights in float64, for some numbers of rows."""
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
        assert worst < (2e-6 if layout.bits < 8 else 1e-5), (layout, rows, worst)
