"""What kernels that are put together by Python, and not parsed from its source, have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T  # noqa: N812

ATTRIBUTES = {"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8}
"""Of a kernel that is scheduled by hand and fused with nothing."""


def vector(kind: str, lanes: int) -> str:
    """Name of a vector dtype; one lane is a plain number."""
    return f"{kind}x{lanes}" if lanes > 1 else kind


def i64(value: int) -> Any:
    """A constant index."""
    return tirx.const(value, "int64")


def remaining(count: Any, most: int, emit: Callable[[Any, int], None]) -> None:
    """Code for the rows of ``count`` beyond whole blocks of ``most``, a power of two.

    ``emit`` is asked for blocks of half that height, a quarter and so on, each of which runs if
    its bit of ``count`` is set; it gets the rows that lie between the last whole block and it.
    """
    height = most // 2
    while height:
        above = i64(2 * height)
        before = tirx.floordiv(tirx.floormod(count, i64(most)), above) * above
        odd = tirx.floormod(tirx.floordiv(count, i64(height)), i64(2)) == i64(1)
        with T.If(odd), T.Then():
            emit(before, height)
        height //= 2
