"""Figures that a running engine keeps: counts, and how long things took by bucket."""

from __future__ import annotations

import bisect
import dataclasses

FIRST_TOKEN_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
NEXT_TOKEN_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Histogram:
    """Counts of seconds by upper bound, as Prometheus has them."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        """Count one value."""
        self.counts[bisect.bisect_left(self.bounds, seconds)] += 1
        self.total += seconds


@dataclasses.dataclass
class Figures:
    """What an engine has done and is doing.

    Attributes:
        running: requests that have a row.
        waiting: requests in the queue.
        finished: requests that came to their end.
        cancelled: requests that were taken back.
        rejected: requests that found the queue full.
        failed: requests that ended with an error.
        prompt_tokens: tokens of prompts that were taken up.
        reused_tokens: those of them that another row had already.
        new_tokens: tokens that were chosen.
        steps: runs of the model.
        pages: pages of the cache that running requests hold.
        kept_pages: pages that only finished rows hold, kept for prompts that begin like them.
        kept_rows: those rows.
        first_token: seconds from the request to its first token.
        next_token: seconds between two tokens of a request.
    """

    running: int = 0
    waiting: int = 0
    finished: int = 0
    cancelled: int = 0
    rejected: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    pages: int = 0
    kept_pages: int = 0
    kept_rows: int = 0
    first_token: Histogram = dataclasses.field(
        default_factory=lambda: Histogram(FIRST_TOKEN_BOUNDS)
    )
    next_token: Histogram = dataclasses.field(default_factory=lambda: Histogram(NEXT_TOKEN_BOUNDS))
