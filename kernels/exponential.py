"""The exponential function in arithmetic that becomes vectors; a call of the C library does not.

Cephes' expf: ``e**x = 2**n * p(r)`` with ``n = floor(x / ln 2 + 1/2)``, ``r = x - n ln 2`` and a
polynomial of degree 7 on [-ln2/2, ln2/2]; relative error below 2e-7.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

LOG2E, LN2_HIGH, LN2_LOW = 1.44269504, 0.693359375, -2.12194440e-4
COEFFICIENTS = (
    1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5,
)  # fmt: skip
"""Of r**7 to r**2; those of r and 1 are 1."""

LOWEST, HIGHEST = -87.0, 88.0
"""Where results are still normal numbers; what is beyond counts as these."""


def exponential(x: Any) -> Any:
    """``e**x`` for float32, saturated to normal numbers (NaN stays NaN); TVM's own for others."""
    if str(x.dtype if hasattr(x, "dtype") else x.ty.dtype) != "float32":
        return tirx.exp(x)

    def number(value: float) -> Any:
        return tirx.const(value, "float32")

    given, whole, rest = (tirx.Var(name, "float32") for name in ("given", "whole", "rest"))
    result = number(COEFFICIENTS[0])
    for coefficient in COEFFICIENTS[1:]:
        result = result * rest + number(coefficient)
    result = result * rest * rest + rest + number(1.0)
    exponent = tirx.Cast("int32", whole) + tirx.const(127, "int32")
    power = tirx.reinterpret("float32", tirx.shift_left(exponent, tirx.const(23, "int32")))
    reduced = given - whole * number(LN2_HIGH) - whole * number(LN2_LOW)
    low, high = number(LOWEST), number(HIGHEST)
    limited = tirx.Select(x < low, low, tirx.Select(x > high, high, x))
    rounded = tirx.floor(given * number(LOG2E) + number(0.5))
    return tirx.Let(
        given, limited, tirx.Let(whole, rounded, tirx.Let(rest, reduced, result * power))
    )
