"""Which numbers a tensor takes, and the 8-bit codes that cover them with least error.

    >>> histogram = Histogram(low, high)          # from a first look at all samples
    >>> histogram.add(array)                      # a second look
    >>> histogram.candidates()                    # {"min-max": (low, high), …}

Codes are those of ``QuantizeLinear`` with one scale and zero point: zero is a code, so that
padding is exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

RULES = ("min-max", "percentile", "least error")
"""How a range is found from what was seen."""

_BINS = 2048
_PERCENTILE = 99.99
_SHRINK = tuple(np.linspace(1.0, 0.2, 41))
_SHRINK_SIDES = tuple(np.linspace(1.0, 0.2, 17))


@dataclasses.dataclass(frozen=True)
class Coding:
    """Scale and zero point of 8-bit codes: ``x = scale * (code - zero)``.

    Attributes:
        scale: a float32, more than 0.
        zero: the code of 0.
        dtype: ``uint8`` or ``int8``.
    """

    scale: float
    zero: int
    dtype: str = "uint8"

    @classmethod
    def covering(cls, low: float, high: float, dtype: str = "uint8") -> Coding:
        """Codes for ``low`` … ``high``, which are widened to hold 0; scales are rounded down."""
        low, high = min(low, 0.0), max(high, 0.0)
        first = int(np.iinfo(dtype).min)
        scale = np.float32((high - low) / 255)
        # A limit before the codes (6 of ReLU6) is implied by them if they do not go beyond it.
        if np.float32(255) * scale > np.float32(high - low):
            scale = np.nextafter(scale, np.float32(0))
        if not scale > np.finfo(np.float32).tiny:
            scale = np.float32(1)  # nothing but zeros
        zero = int(np.clip(np.rint(first - low / float(scale)), first, first + 255))
        return cls(float(scale), zero, dtype)

    def rounded(self, values: np.ndarray) -> np.ndarray:
        """What ``values`` are after coding and decoding, in float64."""
        info = np.iinfo(self.dtype)
        codes = np.clip(np.rint(values / self.scale) + self.zero, info.min, info.max)
        result: np.ndarray = (codes - self.zero) * self.scale
        return result


class Histogram:
    """How often a tensor's numbers fall into equal bins between two limits."""

    def __init__(self, low: float, high: float) -> None:
        """``low`` … ``high`` hold all numbers that will be added."""
        self.low, self.high = min(low, 0.0), max(high, 0.0)
        self.counts = np.zeros(_BINS, np.int64)

    def add(self, array: np.ndarray) -> None:
        """Count the elements of ``array``."""
        width = (self.high - self.low) / _BINS
        if width <= 0 or not array.size:
            return
        places = (array.reshape(-1).astype(np.float32) - np.float32(self.low)) / np.float32(width)
        places = np.clip(places, 0, _BINS - 1).astype(np.int32)
        self.counts += np.bincount(places, minlength=_BINS)

    def candidates(self) -> dict[str, tuple[float, float]]:
        """A range by each of :data:`RULES`."""
        return dict(
            zip(
                RULES,
                ((self.low, self.high), self._percentile(), self._least_error()),
                strict=True,
            )
        )

    def error(self, coding: Coding) -> float:
        """The mean squared error that ``coding`` makes."""
        centers = self._centers()
        wrong = np.square(centers - coding.rounded(centers))
        return float((wrong * self.counts).sum() / max(self.counts.sum(), 1))

    def _centers(self) -> np.ndarray:
        """The middle of each bin; 0 for the bin that holds it, where most numbers are."""
        width = (self.high - self.low) / _BINS
        centers = self.low + width * (np.arange(_BINS) + 0.5)
        centers[np.abs(centers) <= width / 2] = 0
        return centers

    def _percentile(self) -> tuple[float, float]:
        """The range without the smallest and largest 0.01 % of the numbers."""
        total = self.counts.sum()
        if not total:
            return self.low, self.high
        share = np.cumsum(self.counts) / total
        width = (self.high - self.low) / _BINS
        outside = 1 - _PERCENTILE / 100
        first = int(np.searchsorted(share, outside, side="right"))
        last = int(np.searchsorted(share, 1 - outside))
        return self.low + first * width, self.low + (min(last, _BINS - 1) + 1) * width

    def _least_error(self) -> tuple[float, float]:
        """Of smaller and smaller ranges, the one whose coding has the least error."""
        ranges = list(self._smaller())
        errors = [self.error(Coding.covering(*found)) for found in ranges]
        return ranges[int(np.argmin(errors))]

    def _smaller(self) -> Iterator[tuple[float, float]]:
        if self.low == 0 or self.high == 0:
            yield from ((self.low * factor, self.high * factor) for factor in _SHRINK)
            return
        for below in _SHRINK_SIDES:
            for above in _SHRINK_SIDES:
                yield self.low * below, self.high * above


__all__ = ["RULES", "Coding", "Histogram"]
