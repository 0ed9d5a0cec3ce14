"""Seeded random inputs that fit a signature, for verification, `hal run` and `hal bench`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from hal.errors import InputError
from hal.ir import TensorSpec

DEFAULT_EXTENTS = {"batch": 2, "sequence": 5}
"""Extents for dynamic dims of these names; any other dynamic dim gets :data:`OTHER_EXTENT`."""

OTHER_EXTENT = 3


def sample_inputs(
    specs: Iterable[TensorSpec],
    *,
    seed: int = 0,
    extents: Mapping[str, int] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Random arrays for ``specs``.

    Floats are standard normal. Token ids lie below ``metadata["vocab_size"]``; masks are all ones;
    other integers are 0 or 1, which is a valid index or flag almost everywhere.

    Raises:
        InputError: an input is a sequence or an optional, or has an unknown rank.
    """
    rng = np.random.default_rng(seed)
    extents = {**DEFAULT_EXTENTS, **(extents or {})}
    return {spec.name: _sample(spec, rng, extents, metadata or {}) for spec in specs}


def integer_range(name: str, metadata: Mapping[str, Any]) -> tuple[int, int]:
    """The least value that :func:`sample_inputs` takes for an integer input, and the end.

    A mask has one value.
    """
    if name.endswith("mask"):
        return 1, 2
    return 0, metadata.get("vocab_size", 2) if name.endswith("input_ids") else 2


def _sample(
    spec: TensorSpec,
    rng: np.random.Generator,
    extents: Mapping[str, int],
    metadata: Mapping[str, Any],
) -> np.ndarray:
    if spec.container != "tensor" or spec.dims is None:
        raise InputError(f"cannot make a random {spec}", "pass this input from a file")
    shape = tuple(d if isinstance(d, int) else extents.get(d, OTHER_EXTENT) for d in spec.dims)
    if spec.dtype == "string":
        return rng.choice(np.array(["a", "b", "c"], dtype=object), size=shape)
    dtype = np.dtype(spec.dtype)
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(np.bool_)
    if dtype.kind in "iu":
        least, end = integer_range(spec.name, metadata)
        if least:
            return np.full(shape, least, dtype)
        return rng.integers(0, end, shape).astype(dtype)
    if dtype.kind == "c":
        return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)
