"""The goals, and which of them the figures meet."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping

from speed.figures import Cell, best, figures, times_faster

DECODE, PREFILL, LONG, EXPERTS = 1.25, 1.2, 1.2, 2.0
FLOATS, NETWORKS, NETWORKS_FASTER = 1.0, 1.0, 1.1
BANDWIDTH, MEMORY = 0.9, 1.15
_ENOUGH_FASTER, _NETWORKS = 2, 4


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One line: what is wanted, what was found.

    ``met`` is None where nothing was measured, or others disturbed most of the samples.
    """

    number: int
    cell: str
    wanted: str
    found: str
    met: bool | None

    @property
    def word(self) -> str:
        """``met``, ``missed`` or ``not measured``."""
        return "not measured" if self.met is None else "met" if self.met else "missed"


Judge = Callable[[str, Cell, Mapping[str, Cell]], Iterator[Verdict]]


def judge(cells: Mapping[str, Cell]) -> list[Verdict]:
    """All verdicts that the cells allow for, by number."""
    found: list[Verdict] = []
    for key, cell in cells.items():
        judges = _JUDGES.get(_kind(key))
        if judges is not None:
            found += judges(key, cell, cells)
    found += _enough_networks(cells)
    return sorted(found, key=lambda verdict: verdict.number)


def _kind(key: str) -> str:
    part, *rest = key.split("/")
    if part == "machine" or len(rest) != 3:
        return part
    model, form, measure = rest
    if part == "cnn":
        return "network"
    if model.startswith("deepseek"):
        return "experts"
    if form == "long":
        return "long"
    if measure == "decode":
        return "decode" if form in ("4-bit", "8-bit") else f"decode {form}"
    if measure.startswith("prefill"):
        return "prefill" if form in ("4-bit", "8-bit") else ""
    return measure


def _ratio(number: int, key: str, cell: Cell, least: float) -> Verdict:
    wanted = f"at least {least:.2f} x the best peer"
    ratio, ours, theirs = times_faster(cell), best(cell, "hal"), best(cell, "peer")
    if ratio is None or ours is None or theirs is None:
        return Verdict(number, key, wanted, "hal or all peers did not run", None)
    unit = cell["unit"]
    found = (
        f"{ratio:.2f} x: {ours.name} {ours.median:.1f} {unit},"
        f" {theirs.name} {theirs.median:.1f} {unit}"
    )
    if ours.disturbed or theirs.disturbed:
        return Verdict(number, key, wanted, f"{found} †", None)
    return Verdict(number, key, wanted, found, ratio >= least)


def _decode(key: str, cell: Cell, cells: Mapping[str, Cell]) -> Iterator[Verdict]:
    yield _ratio(1, key, cell, DECODE)
    wanted = f"at least {BANDWIDTH:.0%} of what memory allows"
    ours, limit = best(cell, "hal"), best({**cell, "higher_is_better": True}, "machine")
    if ours is None or limit is None:
        yield Verdict(1, key, wanted, "hal or the memory was not measured", None)
        return
    needed = cell["facts"]["bytes_per_token"]
    share = ours.median * needed / 1e9 / limit.median
    found = f"{share:.0%}: {needed / 1e6:.0f} MB a token, {limit.median:.1f} GB/s read meanwhile"
    if ours.disturbed or limit.disturbed:
        yield Verdict(1, key, wanted, f"{found} †", None)
        return
    yield Verdict(1, key, wanted, found, share >= BANDWIDTH)


def _floats(key: str, cell: Cell, cells: Mapping[str, Cell]) -> Iterator[Verdict]:
    yield _ratio(1, key, cell, FLOATS)


def _half_floats(key: str, cell: Cell, cells: Mapping[str, Cell]) -> Iterator[Verdict]:
    """hal reads checkpoints as float32, so that stands against the peers' bfloat16 as well."""
    floats = cells.get(key.replace("/bfloat16/", "/float32/"))
    rows = [r for r in floats["rows"] if r["family"] == "hal"] if floats else []
    yield _ratio(1, key, {**cell, "rows": [*rows, *cell["rows"]]}, FLOATS)


def _prefill(key: str, cell: Cell, cells: Mapping[str, Cell]) -> Iterator[Verdict]:
    yield _ratio(2, key, cell, PREFILL)


def _long(key: str, cell: Cell, cells: Mapping[str, Cell]) -> Iterator[Verdict]:
    yield _ratio(3, key, cell, LONG)


def _experts(key: str, cell: Cell, cells: Mapping[str, Cell]) -> Iterator[Verdict]:
    yield _ratio(3, key, cell, EXPERTS)


def _network(key: str, cell: Cell, cells: Mapping[str, Cell]) -> Iterator[Verdict]:
    yield _ratio(4, key, cell, NETWORKS)


def _enough_networks(cells: Mapping[str, Cell]) -> Iterator[Verdict]:
    ratios = [times_faster(cell) for key, cell in cells.items() if _kind(key) == "network"]
    if not ratios:
        return
    wanted = f"at least {NETWORKS_FASTER:.2f} x in {_ENOUGH_FASTER} of {_NETWORKS}"
    faster = sum(ratio is not None and ratio >= NETWORKS_FASTER for ratio in ratios)
    measured = len(ratios) == _NETWORKS and None not in ratios
    met = faster >= _ENOUGH_FASTER if measured else None
    yield Verdict(4, "cnn", wanted, f"in {faster} of {len(ratios)} that were measured", met)


def _first_token(key: str, cell: Cell, cells: Mapping[str, Cell]) -> Iterator[Verdict]:
    verdict = _ratio(6, key, cell, 1.0)
    yield dataclasses.replace(verdict, wanted="not later than the best peer's")


def _peak_memory(key: str, cell: Cell, cells: Mapping[str, Cell]) -> Iterator[Verdict]:
    """Of each route, with and without what Python and the libraries take before loading."""
    for found in figures(cell, "hal"):
        samples = next(row["samples"] for row in cell["rows"] if row["name"] == found.name)
        weights, cache = samples[0]["weights_bytes"], cell["facts"]["cache_bytes"]
        allowed = (MEMORY * weights + cache) / 1e6
        libraries = statistics.median(sample["libraries"] for sample in samples)
        wanted = f"{MEMORY} x weights + cache = {allowed:.0f} MB"
        for what, size in (
            ("the whole process", found.median),
            ("without Python and libraries", found.median - libraries),
        ):
            yield Verdict(6, key, wanted, f"{found.name}, {what}: {size:.0f} MB", size <= allowed)


_JUDGES: dict[str, Judge] = {
    "decode": _decode,
    "decode float32": _floats,
    "decode bfloat16": _half_floats,
    "prefill": _prefill,
    "long": _long,
    "experts": _experts,
    "network": _network,
    "first-token": _first_token,
    "peak-memory": _peak_memory,
}


def missed(verdicts: list[Verdict]) -> set[str]:
    """Cells of which a line is missed."""
    return {verdict.cell for verdict in verdicts if verdict.met is False}
