"""Figures with a unit, a basis and a source.

A figure without a source is refused: a number nobody can trace is worse than none.
"""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from hal.descriptor._base import UNKNOWN, Model
from hal.errors import did_you_mean

_DECIMAL = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_SMALL = {"": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9, "p": 1e-12}
_CURRENCIES = ("USD", "EUR", "CNY", "JPY")


def _build_units() -> dict[str, tuple[str, float]]:
    units: dict[str, tuple[str, float]] = {}

    def add(dimension: str, symbol: str, prefixes: dict[str, float]) -> None:
        for prefix, factor in prefixes.items():
            units[prefix + symbol] = (dimension, factor)

    add("bytes", "B", _DECIMAL | _BINARY)
    add("bytes per second", "B/s", _DECIMAL | _BINARY)
    for symbol in ("op", "flop", "OP", "FLOP"):
        add("operations per second", f"{symbol}/s", _DECIMAL)
    for symbol in ("op", "flop"):
        units[f"{symbol}/cycle/core"] = ("operations per cycle and core", 1.0)
        units[f"{symbol}/cycle"] = ("operations per cycle", 1.0)
    units["B/cycle/core"] = ("bytes per cycle and core", 1.0)
    units["1/cycle"] = ("instructions per cycle", 1.0)
    add("frequency", "Hz", _DECIMAL)
    add("power", "W", {"m": 1e-3, "u": 1e-6} | _DECIMAL)
    add("time", "s", _SMALL)
    add("energy per byte", "J/B", _SMALL)
    add("energy per operation", "J/op", _SMALL)
    for currency in _CURRENCIES:
        units[currency] = ("price", 1.0)
        units[f"{currency}/h"] = ("price per hour", 1.0)
    return units


UNITS = MappingProxyType(_build_units())
"""Unit symbol to (dimension, factor to the base unit of that dimension)."""

_MOST = MappingProxyType(
    {
        "bytes": 1e16,
        "bytes per second": 1e17,
        "operations per second": 1e20,
        "frequency": 1e11,
        "power": 1e9,
    }
)
"""Far more than the largest systems of 2026 have, in base units: above it the unit is wrong."""

Confidence = Literal["measured", "vendor", "computed", "secondary", "conflicting", "recalled"]
"""How far a figure can be trusted.

``measured`` on the thing itself; ``vendor`` published by its maker; ``computed`` from the
architecture; ``secondary`` said by others; ``conflicting`` when sources disagree (the others are
in ``alternatives``); ``recalled`` from memory of a data sheet, not checked again.
"""


class Quantity(Model):
    """One figure: ``{ value = 31e9, unit = "B/s", source = "…", confidence = "measured" }``."""

    value: float
    """The figure in ``unit``; finite and not negative."""
    unit: str
    """A key of :data:`UNITS`."""
    basis: Literal["dense", "sparse"] | None = None
    """For rates: counted on dense data, or on data with structured zeros."""
    source: str = Field(min_length=1)
    """Where the figure comes from."""
    confidence: Confidence
    # Not strict: behind the validator of "unknown", arrays arrive as Python lists.
    alternatives: tuple[Quantity, ...] = Field(default=(), strict=False)
    """What other sources say, where they disagree."""

    @field_validator("value")
    @classmethod
    def _finite(cls, value: float) -> float:
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"must be finite and not negative, got {value}")
        return value

    @field_validator("unit")
    @classmethod
    def _known_unit(cls, unit: str) -> str:
        if unit not in UNITS:
            raise ValueError(f"unknown unit {unit!r}; {did_you_mean(unit, UNITS)}")
        return unit

    @model_validator(mode="after")
    def _possible(self) -> Quantity:
        most = _MOST.get(self.dimension, math.inf)
        if self.base > most:
            raise ValueError(
                f"{self.value:g} {self.unit} is more than any device has: is the unit right?"
            )
        for other in self.alternatives:
            if other.dimension != self.dimension:
                raise ValueError(f"alternative in {other.unit!r} is not {self.dimension}")
        if self.basis == "sparse" and not self.dimension.startswith("operations"):
            raise ValueError(
                f'basis = "sparse" is for rates of arithmetic, not for {self.dimension}'
            )
        for other in self.alternatives:
            flagged = {self.basis, other.basis} == {"dense", "sparse"}
            if flagged and self.base == other.base:
                raise ValueError(
                    f"{self.value:g} {self.unit} is given as dense and as sparse: "
                    "with structured zeros a chip is faster, so one of them is wrong"
                )
        return self

    @property
    def dimension(self) -> str:
        """What is measured, e.g. ``bytes per second``."""
        return UNITS[self.unit][0]

    @property
    def base(self) -> float:
        """The figure in the base unit of its dimension (bytes, bytes/s, op/s, Hz, W, s, …)."""
        return self.value * UNITS[self.unit][1]


class _Positive:
    """Validator: there is some of it; who does not know how much writes ``"unknown"``."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __call__(self, quantity: Quantity | None) -> Quantity | None:
        if quantity is not None and 0 in (
            quantity.value,
            *(a.value for a in quantity.alternatives),
        ):
            raise ValueError(f'{self.what} of 0 is impossible; write "unknown" if nobody knows it')
        return quantity


class _Dimension:
    """Validator: the quantity must measure one of ``allowed``."""

    def __init__(self, *allowed: str) -> None:
        self.allowed = allowed

    def __call__(self, quantity: Quantity | None) -> Quantity | None:
        if quantity is not None and quantity.dimension not in self.allowed:
            example = next(u for u, (dimension, _) in UNITS.items() if dimension in self.allowed)
            raise ValueError(
                f"unit {quantity.unit!r} measures {quantity.dimension}, "
                f"expected {' or '.join(self.allowed)} (for example {example!r})"
            )
        return quantity


Bytes = Annotated[
    Quantity | None,
    AfterValidator(_Dimension("bytes")),
    AfterValidator(_Positive("a capacity")),
    UNKNOWN,
]
Bandwidth = Annotated[
    Quantity | None,
    AfterValidator(_Dimension("bytes per second", "bytes per cycle and core")),
    AfterValidator(_Positive("a bandwidth")),
    UNKNOWN,
]
Rate = Annotated[
    Quantity | None,
    AfterValidator(
        _Dimension(
            "operations per second",
            "operations per cycle and core",
            "operations per cycle",
        )
    ),
    AfterValidator(_Positive("a rate")),
    UNKNOWN,
]
IssueRate = Annotated[
    Quantity | None,
    AfterValidator(_Dimension("instructions per cycle")),
    AfterValidator(_Positive("a rate")),
    UNKNOWN,
]
Frequency = Annotated[
    Quantity | None,
    AfterValidator(_Dimension("frequency")),
    AfterValidator(_Positive("a frequency")),
    UNKNOWN,
]
Watts = Annotated[Quantity | None, AfterValidator(_Dimension("power")), UNKNOWN]
Money = Annotated[Quantity | None, AfterValidator(_Dimension("price")), UNKNOWN]
MoneyPerHour = Annotated[Quantity | None, AfterValidator(_Dimension("price per hour")), UNKNOWN]
