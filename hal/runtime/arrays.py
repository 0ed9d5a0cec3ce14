"""Inputs of a call: numpy, or anything that speaks DLPack; checked against the signature."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 and the float8 types with numpy)
import numpy as np

from hal.errors import InputError, did_you_mean
from hal.ir import TensorSpec


def as_numpy(value: Any, spec: TensorSpec) -> Any:
    """A numpy view of ``value`` (no copy where DLPack allows it), with the dtype of ``spec``.

    Python numbers and lists take the dtype of ``spec``; arrays must have it already.

    Raises:
        InputError: the dtype or the rank is wrong, or the value is no array.
    """
    if spec.container == "sequence":
        inner = TensorSpec(spec.name, spec.dtype, None)
        return [as_numpy(item, inner) for item in value]
    if spec.container == "optional" and (value is None or isinstance(value, list)):
        return value
    array = _to_array(value, spec)
    wanted = _numpy_dtype(spec.dtype)
    if wanted is not None and array.dtype != wanted:
        raise InputError(
            f"input {spec.name!r} has dtype {array.dtype}, expected {spec.dtype}",
            f"convert it first: x.astype({spec.dtype!r})",
        )
    if spec.dims is not None and array.ndim != len(spec.dims):
        raise InputError(
            f"input {spec.name!r} has rank {array.ndim} ({list(array.shape)}), expected {spec}",
            "add or remove axes to match",
        )
    return array


def check_inputs(given: Mapping[str, Any], specs: Iterable[TensorSpec]) -> dict[str, Any]:
    """Convert and check all inputs of a call; one named dim must have one extent everywhere.

    Raises:
        InputError: a name is unknown or missing, or a dtype, rank or extent is wrong.
    """
    wanted = {s.name: s for s in specs}
    for name in given:
        if name not in wanted:
            raise InputError(f"there is no input {name!r}", did_you_mean(name, wanted))
    missing = [
        name for name, spec in wanted.items() if name not in given and spec.container != "optional"
    ]
    if missing:
        raise InputError(
            f"input {missing[0]!r} is missing",
            "expected " + ", ".join(str(s) for s in wanted.values()),
        )
    arrays = {
        name: as_numpy(given[name], spec) if name in given else None
        for name, spec in wanted.items()
    }
    bind_dims(arrays, wanted.values())
    return arrays


def bind_dims(arrays: Mapping[str, Any], specs: Iterable[TensorSpec]) -> dict[str, int]:
    """Extents of the named dims that ``arrays`` imply.

    Raises:
        InputError: an extent differs from a static dim, or from another input's same-named dim.
    """
    bound: dict[str, tuple[int, str]] = {}
    for spec in specs:
        array = arrays[spec.name]
        if spec.dims is None or not isinstance(array, np.ndarray):
            continue
        for axis, (extent, dim) in enumerate(zip(array.shape, spec.dims, strict=True)):
            if isinstance(dim, int):
                if extent != dim:
                    raise InputError(
                        f"input {spec.name!r} has extent {extent} on axis {axis}, expected {dim}",
                        "this axis is static; export the model with a free axis",
                    )
            elif dim.isidentifier():
                before, other = bound.setdefault(dim, (extent, spec.name))
                if before != extent:
                    raise InputError(
                        f"input {spec.name!r} has {dim}={extent} on axis {axis}, "
                        f"but input {other!r} has {dim}={before}",
                        f"all inputs must agree on {dim}",
                    )
    return {name: extent for name, (extent, _) in bound.items()}


def _to_array(value: Any, spec: TensorSpec) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    if hasattr(value, "detach") and hasattr(value, "requires_grad") and value.requires_grad:
        value = value.detach()
    if hasattr(value, "__dlpack__"):
        try:
            return np.from_dlpack(value)
        except (TypeError, RuntimeError, BufferError, ValueError):
            pass  # dtypes that numpy's DLPack lacks: use the array protocol
    if str(getattr(value, "dtype", "")) == "torch.bfloat16":  # numpy has no name for it
        import torch

        return np.asarray(value.cpu().view(torch.uint16).numpy()).view(np.dtype("bfloat16"))
    if hasattr(value, "__array__"):
        try:
            return np.asarray(value)
        except TypeError as error:
            raise InputError(
                f"input {spec.name!r} cannot be read as an array: {error}", "pass a numpy array"
            ) from error
    wanted = _numpy_dtype(spec.dtype)
    try:
        return np.asarray(value, dtype=wanted)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"input {spec.name!r} cannot be read as {spec.dtype}: {error}", f"expected {spec}"
        ) from error


def _numpy_dtype(name: str) -> np.dtype | None:
    if name == "unknown":
        return None
    return np.dtype(object) if name == "string" else np.dtype(name)


def aligned(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Zeros that begin on a 64-byte boundary, as every runtime can take them without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)
