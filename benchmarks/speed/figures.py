"""Figures of a cell from its samples: medians, ranges, and the best of a family."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

Cell = Mapping[str, Any]
Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Figure:
    """What a contender reached in a cell.

    ``spoiled`` of the samples were disturbed; they count only if fewer than half were not.
    """

    name: str
    median: float
    low: float
    high: float
    samples: int
    spoiled: int
    disturbed: bool


def figure(row: Row) -> Figure | None:
    """The median of a row's good samples; None if it has none at all."""
    samples = row["samples"]
    if not samples or row.get("error"):
        return None
    good = [s["value"] for s in samples if not s["spoiled"]]
    spoiled = len(samples) - len(good)
    disturbed = 2 * len(good) < len(samples)
    values = [s["value"] for s in samples] if disturbed else good
    return Figure(
        row["name"], statistics.median(values), min(values), max(values), len(values), spoiled,
        disturbed,
    )  # fmt: skip


def figures(cell: Cell, family: str) -> list[Figure]:
    """All figures of a family."""
    found = (figure(row) for row in cell["rows"] if row["family"] == family)
    return [each for each in found if each is not None]


def best(cell: Cell, family: str) -> Figure | None:
    """The fastest of a family, or the smallest where less is better."""
    found = figures(cell, family)
    if not found:
        return None
    choose = max if cell["higher_is_better"] else min
    return choose(found, key=lambda each: each.median)


def times_faster(cell: Cell) -> float | None:
    """Best of hal over the best peer, by medians; above 1: hal is faster. None without both."""
    ours, theirs = best(cell, "hal"), best(cell, "peer")
    if ours is None or theirs is None:
        return None
    ratio = ours.median / theirs.median
    return ratio if cell["higher_is_better"] else 1 / ratio
