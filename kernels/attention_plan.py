"""What a kernel of attention over a cache is made for."""

from __future__ import annotations

import dataclasses

TILE = 8
"""Most query heads that share one reading of the keys."""


@dataclasses.dataclass(frozen=True)
class Attention:
    """What an attention kernel is made for.

    ``value_channels`` of the output; ``shared``: values are the first channels of the keys;
    ``bits``: 0, 8 or 4, with a scale for each ``block`` channels; ``window``: positions that a
    query sees, 0 for all; ``lag``: newest positions that it does not see; ``partial``: it also
    gives the logarithm of the sum of exponentials, so that two results can be merged.
    """

    heads: int
    kv_heads: int
    channels: int
    value_channels: int
    scale: float
    softcap: float = 0.0
    window: int = 0
    bits: int = 0
    block: int = 1
    lag: int = 0
    partial: bool = False
    shared: bool = False
    lanes: int = 8
    cores: int = 1
    registers: int = 16

    @property
    def tile(self) -> int:
        """Query heads in a task: all that share keys, unless cores would have nothing to do."""
        group = self.heads // self.kv_heads
        fits = [n for n in range(1, TILE + 1) if group % n == 0]
        busy = [n for n in fits if self.heads // n >= self.cores]
        return max(busy or [1])
