"""The values that a code and a scale may have: what rounding means for a format.

A code stands for a number: an integer itself, or a small float. Methods work on these numbers in
float32 and ask here for the nearest one that there is.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from hal.passes.quantize.formats import Format

_STEPS = {"fp8": 3, "mxfp4": 1}
"""Bits of a significand behind the point."""

_SMALLEST = {"fp8": -6, "mxfp4": 0}
"""The exponent below which numbers are evenly spaced."""

_EXPONENTS = (-23, 15)
"""Powers of two that scales may be: those of OCP's E8M0 that float16 has too."""

STORED: dict[str, Any] = {"fp8": ml_dtypes.float8_e4m3fn, "mxfp4": ml_dtypes.float4_e2m1fn}
"""NumPy dtypes of codes that are floats, one to a byte."""


def round_to_grid(values: np.ndarray, form: Format) -> np.ndarray:
    """``values`` float32, in place, as multiples of the scale that codes are, before clipping.

    Ties go to even codes.
    """
    if form.integer:
        np.rint(values, out=values)
        return values
    exponent = np.frexp(values)[1]
    np.maximum(exponent - 1, _SMALLEST[form.code], out=exponent)
    exponent -= _STEPS[form.code]
    np.ldexp(values, -exponent, out=values)
    np.rint(values, out=values)
    np.ldexp(values, exponent, out=values)
    return values


def code_dtype(form: Format) -> Any:
    """NumPy dtype of codes, one to a byte."""
    if not form.integer:
        return STORED[form.code]
    return np.int8 if form.symmetric else np.uint8


def round_scale(scale: np.ndarray, form: Format) -> np.ndarray:
    """The nearest scales that the format has, as float16 (which holds them all exactly)."""
    if form.code != "mxfp4":
        return scale.astype(np.float16)
    with np.errstate(divide="ignore"):
        exponent = np.rint(np.log2(np.abs(scale)))
    result: np.ndarray = np.exp2(np.clip(exponent, *_EXPONENTS)).astype(np.float16)
    return result


__all__ = ["STORED", "code_dtype", "round_scale", "round_to_grid"]
