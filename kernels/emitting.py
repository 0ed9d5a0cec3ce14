"""What kernels that are put together by Python, and not parsed from its source, have in common."""

from __future__ import annotations

from typing import Any

from tvm import tirx

ATTRIBUTES = {"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8}
"""Of a kernel that is scheduled by hand and fused with nothing."""


def vector(kind: str, lanes: int) -> str:
    """Name of a vector dtype; one lane is a plain number."""
    return f"{kind}x{lanes}" if lanes > 1 else kind


def i64(value: int) -> Any:
    """A constant index."""
    return tirx.const(value, "int64")
