"""Half-quadratic quantization: scales and zero points that serve the many weights, not outliers.

The error is measured by ``|e| ** p`` with p < 1, so a few large errors count less than many small
ones. Half-quadratic splitting alternates between a shrinkage, which sets aside what is better left
wrong, and a least-squares fit of scale and zero point to the rest. Source: Badri and Shaji,
"Half-Quadratic Quantization of Large Machine Learning Models", 2023 (mobiusml.github.io/hqq_blog).
There the zero point is a real number and the scale is fixed; ONNX has integer zero points, so here
the zero point is rounded and the scale is fitted as well.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from hal.passes.quantize.codes import Codes
from hal.passes.quantize.formats import Format
from hal.passes.quantize.grid import round_scale, round_to_grid
from hal.passes.quantize.rtn import cores, in_blocks, round_to_nearest

_NORM = 0.7
_ROUNDS = 12
_GROWTH = 1.02
_ROWS = 1024
"""Blocks that are worked on together."""


def half_quadratic(weight: np.ndarray, form: Format) -> Codes:
    """Quantize a matrix ``[R, C]`` float32, starting from :func:`round_to_nearest`."""
    start = round_to_nearest(weight, form)
    rows, columns = weight.shape
    blocks = in_blocks(weight, form.group)
    scale = start.scale.reshape(-1).astype(np.float32)
    zero = (
        np.zeros(len(scale), np.float32)
        if start.zero is None
        else start.zero.reshape(-1).astype(np.float32)
    )
    codes = np.empty(blocks.shape, start.codes.dtype)

    def work(first: int) -> None:
        part = slice(first, first + _ROWS)
        found = _solve(blocks[part], scale[part], zero[part], form)
        codes[part], scale[part], zero[part] = found

    with ThreadPoolExecutor(cores()) as pool:
        list(pool.map(work, range(0, len(blocks), _ROWS)))
    whole = np.ascontiguousarray(codes.reshape(rows, -1)[:, :columns])
    zeros = None if start.zero is None else zero.astype(np.uint8).reshape(rows, -1)
    return Codes(form, whole, scale.astype(np.float16).reshape(rows, -1), zeros)


def _solve(
    blocks: np.ndarray, scale: np.ndarray, zero: np.ndarray, form: Format
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and zero points of blocks ``[n, g]`` with the least ``|e| ** p`` met."""
    best = np.full(len(blocks), np.inf, np.float32)
    kept_scale, kept_zero = scale.copy(), zero.copy()
    spread = np.maximum(np.abs(blocks).mean(1), 1e-12)
    beta = np.float32(10.0)
    for _ in range(_ROUNDS):
        scale = round_scale(scale, form).astype(np.float32)
        codes = _codes(blocks, scale, zero, form)
        centred = codes - zero[:, None]
        wrong = (blocks - centred * scale[:, None]) / spread[:, None]
        cost = np.sum(np.abs(wrong) ** _NORM, 1)
        better = cost < best
        best[better] = cost[better]
        kept_scale[better], kept_zero[better] = scale[better], zero[better]
        size = np.maximum(np.abs(wrong), 1e-8)
        aside = np.sign(wrong) * np.maximum(size - size ** (_NORM - 1) / beta, 0)
        target = blocks - aside * spread[:, None]
        across = np.einsum("ng,ng->n", centred, centred)
        along = np.einsum("ng,ng->n", target, centred)
        scale = np.where(across > 0, along / np.maximum(across, 1e-12), 0)
        if not form.symmetric:
            with np.errstate(divide="ignore", invalid="ignore"):
                exact = np.mean(codes - target / scale[:, None], 1)
            zero = np.clip(np.rint(np.where(np.isfinite(exact), exact, zero)), 0, form.levels)
        beta *= np.float32(_GROWTH)
    return _codes(blocks, kept_scale, kept_zero, form), kept_scale, kept_zero


def _codes(blocks: np.ndarray, scale: np.ndarray, zero: np.ndarray, form: Format) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = 1 / scale
    inverse[~np.isfinite(inverse)] = 0
    codes = round_to_grid(blocks * inverse[:, None], form)
    if form.symmetric:
        return np.clip(codes, form.lowest, form.highest, out=codes)
    codes += zero[:, None]
    result: np.ndarray = np.clip(codes, 0, form.levels, out=codes)
    return result
