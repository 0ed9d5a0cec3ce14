"""Memory levels, from the nearest cache to the largest pool."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hal.descriptor._base import Model
from hal.descriptor._quantity import Bandwidth, Bytes


class MemoryLevel(Model):
    """One level, nearest first: ``[[memory]] level = "l2"``."""

    level: str = Field(min_length=1)
    """Name of the level (``l1d``, ``l2``, ``dram``, ``hbm``, ``sram``, …); the key for merging."""
    kind: Literal["cache", "scratch", "main", "flash", "link"] = "main"
    """``cache`` is run by hardware, ``scratch`` by software; ``link`` leads to other memory."""
    capacity: Bytes = None
    """Of one instance."""
    bandwidth: Bandwidth = None
    """Sustained reads of one instance."""
    line_bytes: int | None = Field(default=None, gt=0)
    """Transfer granularity."""
    cores: int | None = Field(default=None, gt=0)
    """How many cores share one instance; absent: all of them."""
