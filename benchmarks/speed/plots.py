"""A plot of hal beside the best peer in each cell, where matplotlib is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from speed.figures import Cell, times_faster


def ratios(cells: Mapping[str, Cell], path: Path) -> bool:
    """Bars from 1; False if there is nothing to draw, or nothing to draw with."""
    found = {key: times_faster(cell) for key, cell in cells.items()}
    shown = {key: ratio for key, ratio in found.items() if ratio is not None}
    if not shown or importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.28 * len(shown) + 1))
    names, values = list(shown)[::-1], list(shown.values())[::-1]
    colours = ["tab:green" if value >= 1 else "tab:red" for value in values]
    axes.barh(names, [value - 1 for value in values], left=1, color=colours)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("hal's best route / best peer (above 1: hal is faster)")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
