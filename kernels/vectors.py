"""Vectors in kernels. One lane is no vector: TVM has neither ramps nor broadcasts of one."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T  # noqa: N812


def vector_lanes(extent: int, lanes: int) -> int:
    """The largest power of two up to ``lanes`` that divides ``extent``."""
    lanes = 1 << max(lanes, 1).bit_length() - 1
    while lanes > 1 and extent % lanes:
        lanes //= 2
    return lanes


def span(start: Any, lanes: int) -> Any:
    """The index of ``lanes`` neighbours from ``start``."""
    return T.ramp(start, 1, lanes) if lanes > 1 else start


def spread(x: Any, lanes: int) -> Any:
    """A number in all of ``lanes``."""
    return T.broadcast(x, lanes) if lanes > 1 else x
