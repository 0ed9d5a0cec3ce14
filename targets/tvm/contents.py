"""Arithmetic on small integer tensors whose elements are known as dims, done at compile time.

Each function returns the result's elements, or None where they are not known; then the op runs
as a kernel like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tvm import tirx

from hal.targets.tvm.dims import Symbols, as_int, at_least, at_most, floordiv

if TYPE_CHECKING:
    from hal.targets.tvm.lowering import Operand


def array(items: Sequence[Any], shape: Sequence[int] | None = None) -> np.ndarray:
    """An object array of dims."""
    result = np.empty(len(items), object)
    result[:] = list(items)
    return result if shape is None else result.reshape(tuple(shape))


def mapped(content: np.ndarray, function: Callable[[Any], Any]) -> np.ndarray:
    """``function`` of each element."""
    return array([function(item) for item in content.flat], content.shape)


def _divide(a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int):
        if b == 0:
            return None
        quotient = abs(a) // abs(b)
        return quotient if (a < 0) == (b < 0) else -quotient
    return floordiv(a, b)


def _modulo(a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int):
        return None if b == 0 else a % b
    return tirx.floormod(a, b)


_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "Add": lambda a, b: a + b,
    "Sum": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": _divide,
    "Mod": _modulo,
    "Max": at_least,
    "Min": at_most,
}
_CONDITIONS: dict[str, Callable[[Any, Any], Any]] = {
    "Equal": lambda a, b: a == b,
    "Greater": lambda a, b: a > b,
    "GreaterOrEqual": lambda a, b: a >= b,
    "Less": lambda a, b: a < b,
    "LessOrEqual": lambda a, b: a <= b,
    "And": lambda a, b: a and b,
    "Or": lambda a, b: a or b,
    "Xor": lambda a, b: a != b,
}


def binary(symbols: Symbols, op_type: str, a: Operand, b: Operand) -> np.ndarray | None:
    """Elements of an arithmetic op or a comparison, broadcast."""
    if a.content is None or b.content is None:
        return None
    left, right = np.broadcast_arrays(a.content, b.content)
    items: list[Any] = []
    for x, y in zip(left.flat, right.flat, strict=True):
        item = _element(symbols, op_type, x, y)
        if item is None:
            return None
        items.append(item)
    return array(items, left.shape)


def _element(symbols: Symbols, op_type: str, x: Any, y: Any) -> Any:
    if op_type in _ARITHMETIC:
        item = _ARITHMETIC[op_type](x, y)
        return None if item is None else symbols.simplify(item)
    if op_type not in _CONDITIONS:
        return None
    if op_type == "Equal" and not (isinstance(x, int) and isinstance(y, int)):
        item = tirx.EQ(*(tirx.const(v, "int64") if isinstance(v, int) else v for v in (x, y)))
    else:
        item = _CONDITIONS[op_type](x, y)
    return symbols.decide(item)


def where(symbols: Symbols, condition: Operand, x: Operand, y: Operand) -> np.ndarray | None:
    """Elements chosen by a condition that is known."""
    if condition.content is None or x.content is None or y.content is None:
        return None
    if not all(isinstance(c, (bool, int)) for c in condition.content.flat):
        return None
    chosen = np.broadcast_arrays(condition.content, x.content, y.content)
    items = [a if c else b for c, a, b in zip(*(part.flat for part in chosen), strict=True)]
    return array(items, chosen[0].shape)


def integers(content: np.ndarray | None) -> list[int] | None:
    """The elements as Python ints if all are numbers."""
    if content is None or not all(isinstance(as_int(i), int) for i in content.flat):
        return None
    return [int(as_int(i)) for i in content.flat]
