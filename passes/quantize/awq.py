"""AWQ: input channels that matter are made larger before rounding, and smaller in the input.

``W x = (W s) (x / s)``; where the division goes is a matter of :mod:`.folding`. s is searched
among powers of the channels' size, ``s = |x| ** alpha``, for the least error of the
results of all layers that read x; codes are rounded to nearest with the channels' mean square as
importance. Source: Lin et al., arXiv 2306.00978.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hal.passes.quantize.codes import Codes
from hal.passes.quantize.formats import Format
from hal.passes.quantize.rtn import round_to_nearest

_ALPHAS = tuple(step / 10 for step in range(11))
_MOST_ROWS = 1024
"""Rows of a weight that the search looks at."""


def weighted_rounding(weight: np.ndarray, form: Format, gram: np.ndarray) -> Codes:
    """Round ``weight`` ``[N, K]`` to nearest, errors weighed by the diagonal of ``gram``."""
    return round_to_nearest(weight, form, np.ascontiguousarray(np.diagonal(gram)))


def search_scales(
    weights: Sequence[np.ndarray], forms: Sequence[Format], gram: np.ndarray
) -> np.ndarray:
    """Scales s, float32 ``[K]``, for layers of one input, by the sum of their ``tr(E H Eᵀ)``."""
    size = np.sqrt(np.maximum(np.diagonal(gram), 1e-12))
    best, chosen = np.inf, np.ones(len(gram), np.float32)
    for alpha in _ALPHAS:
        scale = (size**alpha).astype(np.float32)
        scale /= np.sqrt(scale.max() * scale.min())
        inside = gram / np.outer(scale, scale)
        error = 0.0
        for weight, form in zip(weights, forms, strict=True):
            part = weight[:: max(1, len(weight) // _MOST_ROWS)] * scale
            left = part - weighted_rounding(part, form, inside).dequantized()
            error += float(np.vdot(left @ inside, left)) * len(weight) / len(part)
        if error < best:
            best, chosen = error, scale
    return chosen


__all__ = ["search_scales", "weighted_rounding"]
