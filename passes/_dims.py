"""Dims as expressions, and the record of what is known about a graph's shapes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import onnx_ir as ir
import sympy

Extent = Any
"""A ``sympy`` expression (``sympy`` ships no usable types)."""

LIMIT = 64
"""Integer tensors with more elements than this are data, not shapes."""


@dataclasses.dataclass
class Shapes:
    """What :func:`hal.passes._symbolic.analyse` finds: shapes and integer elements by value."""

    shape: dict[ir.Value, tuple[Extent, ...]] = dataclasses.field(default_factory=dict)
    elements: dict[ir.Value, np.ndarray] = dataclasses.field(default_factory=dict)

    def dims(self, value: ir.Value) -> ir.Shape | None:
        """The shape as the IR writes it: numbers, names, expressions; None where not known."""
        extents = self.shape.get(value)
        return None if extents is None else ir.Shape([to_dim(e) for e in extents])


@functools.lru_cache(maxsize=4096)
def parse(text: str) -> Extent:
    """Expression for a dim's text; a text that is no expression is one opaque symbol."""
    try:
        return ir.SymbolicDim(text)._expr
    except Exception:  # noqa: BLE001 - onnx_ir raises several types on names such as "input.1_dim_0"
        return sympy.Symbol(text, integer=True, positive=True)


def fresh() -> Extent:
    """An extent about which nothing is known."""
    return sympy.Dummy("d", integer=True, nonnegative=True)


def to_expr(extent: int | ir.SymbolicDim | str | None) -> Extent:
    """Expression for one dim of an IR shape."""
    if isinstance(extent, ir.SymbolicDim):
        extent = extent.value
    if isinstance(extent, (int, np.integer)):
        return sympy.Integer(int(extent))
    return fresh() if extent is None else parse(extent)


def to_dim(extent: Extent) -> int | str | None:
    """Inverse of :func:`to_expr`; None where a ``Dummy`` is left."""
    if extent.is_Integer:
        return int(extent)
    return None if opaque(extent) else text(extent)


def known(elements: np.ndarray) -> list[int] | None:
    """The elements as numbers, when all of them are numbers."""
    flat = list(elements.reshape(-1))
    return [int(e) for e in flat] if all(getattr(e, "is_Integer", False) for e in flat) else None


@functools.lru_cache(maxsize=16384)
def text(extent: Extent) -> str:
    """The expression as text."""
    return str(extent)


@functools.lru_cache(maxsize=16384)
def opaque(extent: Extent) -> bool:
    """True where something unknown is part of the expression."""
    return bool(extent.atoms(sympy.Dummy))


def with_zeros(extent: Extent) -> Extent:
    """The expression with names that may be zero, as a past is; ``sympy``'s are positive."""
    names = {s: sympy.Dummy("n", integer=True, nonnegative=True) for s in extent.free_symbols}
    return extent.subs(names)


@functools.lru_cache(maxsize=16384)
def quotient(first: Extent, second: Extent) -> Extent:
    """``first / second`` with common factors cancelled."""
    return sympy.cancel(first / second)
