"""Round to nearest, with the scale of each block searched for the least squared error."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from hal.passes.quantize.codes import Codes
from hal.passes.quantize.formats import Format
from hal.passes.quantize.grid import code_dtype, round_scale, round_to_grid

_AT_ONCE = 1 << 16
"""Weights that are worked on together: with their temporaries they fit a core's cache."""

_SHRINK = {
    8: (1.0, 1.008),
    4: (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 1.05, 1.1),
    3: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 1.1, 1.2),
    2: (1.0, 0.9, 0.82, 0.74, 0.66, 0.58, 0.5, 1.15, 1.3),
}
"""Factors on the plain scale that are tried, by bits."""

_SHRINK_TERNARY = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.45, 0.4, 0.35, 0.3)

_SHRINK_FLOATS = {"fp8": (1.0, 0.93, 1.07, 1.15, 1.25, 1.36, 1.5, 1.7), "mxfp4": (0.5, 1.0, 2.0)}
"""Floats lose little where scales are too large: what differs is where numbers fall between
powers of two. Powers of two are not refined, so all near ones are tried."""


def round_to_nearest(
    weight: np.ndarray, form: Format, importance: np.ndarray | None = None
) -> Codes:
    """Quantize a matrix ``[R, C]`` float32, each block by itself.

    Symmetric integers use their whole range: the value farthest from zero gets the lowest code, so
    a scale may be negative. Of several scales the one with the least squared error is taken, after
    the best scale for its codes was solved for. ``importance`` ``[C]`` weighs the errors of the
    columns (the mean square of the input there).
    """
    rows, columns = weight.shape
    blocks = in_blocks(weight, form.group)
    weights = None
    if importance is not None:
        weights = in_blocks(np.maximum(importance, 1e-12)[None], form.group).astype(np.float32)
    count, length = blocks.shape
    codes = np.empty((count, length), code_dtype(form))
    scale = np.empty(count, np.float16)
    zero = None if form.symmetric else np.empty(count, np.uint8)
    per_row = count // rows

    def work(start: int) -> None:
        part = slice(start, min(start + step, count))
        each = None
        if weights is not None:
            each = weights[np.arange(part.start, part.stop) % per_row]
        solve = _symmetric if form.symmetric else _asymmetric
        found, scales, zeros = solve(blocks[part], form, each)
        scale[part] = scales
        if zero is not None:
            zero[part] = zeros if zeros is not None else 0
        codes[part] = found.astype(codes.dtype)

    step = max(1, _AT_ONCE // length)
    with ThreadPoolExecutor(cores()) as pool:
        list(pool.map(work, range(0, count, step)))
    whole = codes.reshape(rows, -1)[:, :columns]
    return Codes(
        form,
        np.ascontiguousarray(whole),
        scale.reshape(rows, -1),
        None if zero is None else zero.reshape(rows, -1),
    )


def in_blocks(matrix: np.ndarray, group: int) -> np.ndarray:
    """Rows cut into blocks of ``group`` columns ``[R * G, group]``, zeros after the last column."""
    columns = matrix.shape[1]
    length = group or columns
    if columns % length:
        matrix = np.pad(matrix, ((0, 0), (0, -columns % length)))
    return np.ascontiguousarray(matrix).reshape(-1, length)


def cores() -> int:
    """Processors that this process may use."""
    try:
        return max(1, len(os.sched_getaffinity(0)))
    except AttributeError:
        return os.cpu_count() or 1


_Found = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def _symmetric(blocks: np.ndarray, form: Format, weights: np.ndarray | None) -> _Found:
    """Codes (float), scales float16 and no zero points for blocks ``[n, g]``."""
    size = np.abs(blocks)
    extreme = np.take_along_axis(blocks, size.argmax(1)[:, None], 1)[:, 0]
    base = round_scale(extreme / np.float32(form.lowest), form).astype(np.float32)
    best = np.full(len(blocks), -np.inf, np.float32)
    chosen = base.copy()
    ratio = np.empty_like(blocks)
    weighted = blocks if weights is None else blocks * weights
    fixed = form.code == "mxfp4"  # scales cannot follow the codes
    for factor in _factors(form):
        tried = base * np.float32(factor)
        codes = _rounded(blocks, tried, form, ratio)
        along = np.einsum("ng,ng->n", weighted, codes)
        if weights is None:
            across = np.einsum("ng,ng->n", codes, codes)
        else:
            across = np.einsum("ng,ng,ng->n", codes, codes, weights)
        scale = tried if fixed else _ratio(along, across)
        gain = scale * (2 * along - scale * across)  # what the error is less by
        better = gain > best
        best[better] = gain[better]
        chosen[better] = scale[better]
    found = round_scale(chosen, form)
    return _rounded(blocks, found.astype(np.float32), form, ratio), found, None


def _factors(form: Format) -> tuple[float, ...]:
    if not form.integer:
        return _SHRINK_FLOATS[form.code]
    return _SHRINK_TERNARY if form.ternary else _SHRINK[form.bits]


def _ratio(along: np.ndarray, across: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        result: np.ndarray = np.where(across > 0, along / across, 0)
    return result


def _rounded(blocks: np.ndarray, scale: np.ndarray, form: Format, out: np.ndarray) -> np.ndarray:
    """The numbers that codes of ``blocks`` ``[n, g]`` stand for, written to ``out``."""
    with np.errstate(divide="ignore"):
        inverse = 1 / scale
    inverse[~np.isfinite(inverse)] = 0
    np.multiply(blocks, inverse[:, None], out=out)
    round_to_grid(out, form)
    return np.clip(out, form.lowest, form.highest, out=out)


def _asymmetric(blocks: np.ndarray, form: Format, weights: np.ndarray | None) -> _Found:
    """Codes (float), scales float16 and zero points for blocks ``[n, g]``."""
    low = np.minimum(blocks.min(1), 0)
    high = np.maximum(blocks.max(1), 0)
    best = np.full(len(blocks), np.inf, np.float32)
    scale = np.zeros(len(blocks), np.float16)
    zero = np.zeros(len(blocks), np.float32)
    for factor in _SHRINK[form.bits]:
        if factor > 1:
            continue
        plain = (high - low) * np.float32(factor) / np.float32(form.levels)
        for point in _zero_points(low, plain, form):
            codes = _codes(blocks, plain, point, form)
            centred = codes - point[:, None]
            weighted = centred if weights is None else centred * weights
            across = np.einsum("ng,ng->n", centred, weighted)
            along = np.einsum("ng,ng->n", blocks, weighted)
            with np.errstate(divide="ignore", invalid="ignore"):
                refit = np.where(across > 0, along / across, 0).astype(np.float16)
            left = blocks - centred * refit.astype(np.float32)[:, None]
            error = np.einsum("ng,ng->n", left, left if weights is None else left * weights)
            better = error < best
            best[better] = error[better]
            scale[better], zero[better] = refit[better], point[better]
    return _codes(blocks, scale.astype(np.float32), zero, form), scale, zero


def _zero_points(low: np.ndarray, scale: np.ndarray, form: Format) -> list[np.ndarray]:
    with np.errstate(divide="ignore", invalid="ignore"):
        exact = np.where(scale > 0, -low / scale, 0)
    nearest = np.clip(np.rint(exact), 0, form.levels)
    other = np.clip(nearest + np.where(exact > nearest, 1, -1), 0, form.levels)
    return [nearest.astype(np.float32), other.astype(np.float32)] if form.bits < 8 else [nearest]


def _codes(blocks: np.ndarray, scale: np.ndarray, zero: np.ndarray, form: Format) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = 1 / scale
    inverse[~np.isfinite(inverse)] = 0
    codes: np.ndarray = np.rint(blocks * inverse[:, None]) + zero[:, None]
    return np.clip(codes, 0, form.levels, out=codes)
