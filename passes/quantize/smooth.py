"""SmoothQuant: input channels with outliers are made smaller, and their weights larger.

Rounding activations to few bits costs most where one channel is much larger than its neighbours.
``W x = (W s) (x / s)`` with ``s = max|x| ** a / max|w| ** (1 - a)`` moves some of that into the
weights, which have it easier; a, from 0 to 1, is searched for the least error of the rounded
products of all layers that read x, and s = 1 is tried as well. Where the division goes is a matter
of :mod:`.folding`. Source: Xiao et al., arXiv 2211.10438 (there a is the same everywhere).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hal.passes.quantize.formats import Format
from hal.passes.quantize.rtn import round_to_nearest
from hal.passes.quantize.streaming import round_activations

_STRENGTHS = tuple(step / 10 for step in range(11))
_MOST_ROWS = 1024
"""Rows of a weight that the search looks at."""

SAMPLE = 1024
"""Tokens that the search looks at."""

_PRODUCT = 256
_FARTHEST = 32.0
"""s at most: scales of weights are float16, which is coarse below 6e-5."""


def search_strength(
    weights: Sequence[np.ndarray], forms: Sequence[Format], rows: np.ndarray
) -> np.ndarray:
    """Scales s, float32 ``[K]``, for layers ``[N, K]`` of one input with samples ``[n, K]``."""
    parts = [weight[:: max(1, len(weight) // _MOST_ROWS)] for weight in weights]
    some = np.ascontiguousarray(rows[:: max(1, len(rows) // _PRODUCT)])
    wanted = [some @ part.T for part in parts]
    inputs = np.maximum(np.abs(rows).max(0), 1e-5)
    largest = np.maximum(np.max([np.abs(weight).max(0) for weight in weights], axis=0), 1e-8)
    best, chosen = np.inf, np.ones(rows.shape[1], np.float32)
    for strength in (None, *_STRENGTHS):
        scale = np.ones_like(chosen)
        if strength is not None:
            scale = (inputs**strength / largest ** (1 - strength)).astype(np.float32)
            scale /= np.sqrt(scale.max() * scale.min())
            np.clip(scale, 1 / _FARTHEST, _FARTHEST, out=scale)
        error = 0.0
        for part, form, weight, right in zip(parts, forms, weights, wanted, strict=True):
            x = some / scale
            importance = np.square(x).mean(0)
            if form.activations == 8:
                x = round_activations(x, form.group)
            rounded = round_to_nearest(part * scale, form, importance).dequantized()
            left = x @ rounded.T - right
            error += float(np.vdot(left, left)) * len(weight) / len(part)
        if error < best:
            best, chosen = error, scale
    return chosen


__all__ = ["SAMPLE", "search_strength"]
