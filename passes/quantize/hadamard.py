"""Orthogonal matrices that spread every channel evenly over all, applied without being formed.

A randomized Hadamard matrix: random signs, then ``H / sqrt(n)`` with H of 1 and -1. Sizes that are
no power of two are a Kronecker product of a Hadamard matrix of the largest power of two in them
and a Hartley matrix, ``cos + sin`` of ``2 pi i j / m``, of what is left.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

_LARGEST = 64
"""Factors at most: the product of small matrices is cheaper than one large matrix."""


@dataclasses.dataclass(frozen=True)
class Rotation:
    """The orthogonal matrix Q ``[size, size]`` of one size; equal sizes have equal matrices."""

    size: int

    def apply(self, array: np.ndarray, axis: int = -1) -> np.ndarray:
        """``array @ Q`` along one axis, float32."""
        moved = np.moveaxis(np.asarray(array, np.float32), axis, -1) * _signs(self.size)
        shape = moved.shape
        factors = _factors(self.size)
        sizes = [len(factor) for factor in factors]
        moved = moved.reshape(-1, *sizes)
        for place, factor in enumerate(factors):
            moved = np.moveaxis(np.tensordot(moved, factor, ((place + 1,), (0,))), -1, place + 1)
        return np.ascontiguousarray(np.moveaxis(moved.reshape(shape), -1, axis))

    def diagonal(self, scale: np.ndarray) -> np.ndarray:
        """``Qᵀ diag(scale) Q``."""
        turned = self.apply(np.eye(self.size, dtype=np.float32)).T
        return self.apply(turned * np.asarray(scale, np.float32))


@functools.lru_cache(maxsize=8)
def _signs(size: int) -> np.ndarray:
    signs = np.random.default_rng(size).integers(0, 2, size) * 2 - 1
    return signs.astype(np.float32)


@functools.lru_cache(maxsize=8)
def _factors(size: int) -> tuple[np.ndarray, ...]:
    """Orthogonal matrices whose Kronecker product has this size."""
    power = size & -size
    found, rest = [], size // power
    while power > 1:
        part = min(power, _LARGEST)
        found.append(_hadamard(part))
        power //= part
    if rest > 1 or not found:
        found.append(_hartley(rest))
    return tuple(found)


def _hadamard(size: int) -> np.ndarray:
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    result: np.ndarray = matrix / np.float32(np.sqrt(size))
    return result


def _hartley(size: int) -> np.ndarray:
    angle = 2 * np.pi / size * (np.outer(np.arange(size), np.arange(size)) % size)
    result: np.ndarray = ((np.cos(angle) + np.sin(angle)) / np.sqrt(size)).astype(np.float32)
    return result


__all__ = ["Rotation"]
