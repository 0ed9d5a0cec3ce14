"""``RESULTS.md`` from the stored results."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from speed import plots
from speed.contenders import groups
from speed.figures import Cell, best, figure
from speed.goals import Verdict, judge, missed
from speed.measure import SPOILED

Data = Mapping[str, Any]

_STAGES = {
    "import_seconds": "importing libraries, s", "load_seconds": "loading, s",
    "first_seconds": "first token, s",
}  # fmt: skip
_MEMORY = {
    "own": "at the end its own, MB", "mapped": "mapped from files, MB",
    "libraries": "both before loading, MB",
}  # fmt: skip
_HEAD = """\
# Speed beside other runtimes

Made by `python benchmarks/run.py` from `results/{source}`; do not edit.
"""
_METHOD = """\
Every contender is a process of its own that loads once; rounds go through all contenders, each
second one backwards, and who has no turn is stopped. Same tokens, same number of threads for all.
Figures are medians, with the lowest and highest sample in brackets. A sample during which other
programs took more than {spoiled:.0%} of the processors' time is taken again, a few times;
† marks figures of which most samples stayed spoiled; they decide nothing. Weights are random and
seeded, and begin as the same numbers for all. *Memory: read* is this machine's memory read by all
threads in huge pages, in the same rounds.
"""


def write(data: Data, path: Path, source: str) -> None:
    """Write the page, and a plot beside the results where matplotlib is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(page(data, source)).rstrip() + "\n")
    plots.ratios(data["cells"], path.parent / "results" / f"{Path(source).stem}.png")


def page(data: Data, source: str) -> Iterator[str]:
    """The page by lines."""
    yield _HEAD.format(source=source)
    yield from _machine(data)
    yield _METHOD.format(spoiled=SPOILED)
    verdicts = judge(data["cells"])
    yield from _goals(verdicts)
    yield from _not_measured(data)
    yield from _groups(data)
    yield from _profiles(data.get("profiles", {}), missed(verdicts))
    yield from _own_scripts(data)


def _not_measured(data: Data) -> Iterator[str]:
    """Cells that a whole run fills and these results lack."""
    quick = bool(data.get("machine", {}).get("quick"))
    planned = [group.cell(measure) for group in groups(quick) for measure in group.measures]
    left = [f"`{cell}`" for cell in planned if cell not in data["cells"]]
    if left:
        yield f"Not measured: {', '.join(left)}.\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table of Markdown, and an empty line."""
    for row in (head, ["---"] * len(head), *rows):
        yield "| " + " | ".join(text.replace("|", "\\|") for text in row) + " |"
    yield ""


def number(value: float) -> str:
    """Four digits or so, never with an exponent."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _machine(data: Data) -> Iterator[str]:
    facts = data.get("machine")
    if not facts:
        return
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    yield (
        f"{facts['date']}, {facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads,"
        f" {facts['memory_gb']} GB, {facts['system']}; {facts['rounds']} rounds."
    )
    yield f"Flags: {' '.join(facts['flags'])}."
    yield f"Python {facts['python']}, {versions}."
    limits = []
    for key, cell in data["cells"].items():
        if key.startswith("machine/"):
            found = best(cell, "machine")
            error = cell["rows"][0].get("error", "")
            told = f"{number(found.median)} {cell['unit']}" if found else error
            limits.append(f"{cell['title']} {told}")
    if limits:
        yield f"Measured limits, {facts['threads']} threads: {'; '.join(limits)}."
    if facts["quick"]:
        yield "\n**A quick run on tiny models: it shows that everything runs, and no speed.**"
    yield ""


def _goals(verdicts: Sequence[Verdict]) -> Iterator[str]:
    yield "## Goals\n"
    met = sum(verdict.met is True for verdict in verdicts)
    not_measured = sum(verdict.met is None for verdict in verdicts)
    lost = len(verdicts) - met - not_measured
    yield f"{met} met, {lost} missed, {not_measured} not measured.\n"
    rows = [
        [str(v.number), f"`{v.cell}`", v.wanted, v.found, f"**{v.word}**" if not v.met else v.word]
        for v in verdicts
    ]
    yield from table(["goal", "cell", "wanted", "found", ""], rows)


def _groups(data: Data) -> Iterator[str]:
    cells: Mapping[str, Cell] = data["cells"]
    groups: dict[str, list[str]] = {}
    for key in cells:
        if not key.startswith("machine/"):
            groups.setdefault(cells[key]["group"], []).append(key)
    yield "## Figures\n"
    for title, keys in groups.items():
        yield f"### {title}\n"
        yield from _earlier(data, {str(cells[key].get("measured")) for key in keys})
        yield from _group([cells[key] for key in keys])


def _earlier(data: Data, dates: set[str]) -> Iterator[str]:
    """On what figures of earlier runs were measured."""
    for date in sorted(dates & set(data.get("earlier", {}))):
        facts = data["earlier"][date]
        yield f"Measured {date} on {facts['cpu']}, {facts['threads']} threads.\n"


def _group(cells: Sequence[Cell]) -> Iterator[str]:
    names = list(dict.fromkeys(row["name"] for cell in cells for row in cell["rows"]))
    rows, notes = [], {}
    for name in names:
        line = [name]
        for cell in cells:
            row = next((r for r in cell["rows"] if r["name"] == name), None)
            line.append(_shown(cell, row))
            if row and row.get("error"):
                notes[row["error"]] = [*notes.get(row["error"], []), name]
            if row and row.get("note"):
                notes[row["note"]] = list(dict.fromkeys([*notes.get(row["note"], []), name]))
        rows.append(line)
    yield from table(["", *(f"{cell['title']}, {cell['unit']}" for cell in cells)], rows)
    for cell in cells:
        yield from _parts(cell)
    for note, who in notes.items():
        yield f"- {', '.join(dict.fromkeys(who))}: {note}"
    yield ""


def _parts(cell: Cell) -> Iterator[str]:
    """What the figures of cold processes are made of: medians of stages, or kinds of memory."""
    for parts in (_STAGES, _MEMORY):
        rows = [
            [row["name"], *(_median(row, key) for key in parts)]
            for row in cell["rows"]
            if any(key in sample for key in parts for sample in row["samples"])
        ]
        if rows:
            yield from table(["", *parts.values()], rows)


def _median(row: Mapping[str, Any], key: str) -> str:
    values = [s[key] for s in row["samples"] if s.get(key) is not None]
    return number(statistics.median(values)) if values else ""


def _shown(cell: Cell, row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    found = figure(row)
    if found is None:
        return "did not run"
    top = best(cell, row["family"])
    text = number(found.median)
    if top is not None and row["family"] != "machine" and top.name == found.name:
        text = f"**{text}**"
    unit = " GB/s" if row["family"] == "machine" else ""
    mark = " †" if found.disturbed else ""
    return f"{text}{unit} ({number(found.low)}–{number(found.high)}){mark}"


def _profiles(profiles: Mapping[str, Any], cells: set[str]) -> Iterator[str]:
    """Where hal's time goes in cells of which a line is missed."""
    lines = []
    for group, contenders in profiles.items():
        for name, requests in contenders.items():
            if "error" in requests:
                lines.append(f"- `{group}`, {name}: no profile: {requests['error']}")
                continue
            for key, shares in requests.items():
                if f"{group}/{key}" in cells:
                    lines.append(f"- `{group}/{key}`, {name}: {_shares(shares)}")
    if lines:
        yield "## Where hal's time goes in what is missed\n"
        yield (
            "Parts of the wall time of a profiled run; *rest* is what lies between kernels, the"
            " profiler's own work among it.\n"
        )
        yield from lines
        yield ""


def _shares(shares: Mapping[str, Any]) -> str:
    parts = [f"{name} {share:.0%}" for name, share in shares["kernels"].items() if share >= 0.01]
    return ", ".join(
        [*parts, f"others {shares['other_kernels']:.0%}", f"rest {shares['rest']:.0%}"]
    )


def _own_scripts(data: Data) -> Iterator[str]:
    """What the scripts for kernels and for compile time found."""
    for name, title in (("kernels", "Kernels"), ("compile", "Compile time")):
        found = data.get(name)
        if not found:
            continue
        yield f"## {title}\n"
        if "error" in found:
            yield f"Not measured: {found['error']}\n"
        elif name == "compile":
            yield from _compile_time(found["result"])
        else:
            yield from _kernels(found["result"])


def _kernels(result: Mapping[str, Any]) -> Iterator[str]:
    yield (
        "Matrix products of the TVM route: parts of what memory or arithmetic allow, measured in"
        " the same turns (`benchmarks/kernels.py`).\n"
    )
    groups: dict[tuple[str, int, int], list[float]] = {}
    for product in result["products"]:
        key = (product["form"], product["rows"], product["bits"])
        groups.setdefault(key, []).append(product["share"])
    rows = [
        [form, str(count), str(bits), str(len(shares)),
         f"{statistics.median(shares):.0%}", f"{min(shares):.0%}"]
        for (form, count, bits), shares in groups.items()
    ]  # fmt: skip
    yield from table(["", "rows", "bits of a vector", "products", "median", "worst"], rows)


def _compile_time(result: Mapping[str, Any]) -> Iterator[str]:
    yield (
        "From a module in memory to a bundle or file on disk, with a loaded session; medians"
        " (`benchmarks/compile_time.py`).\n"
    )
    rows = [
        [
            way, f"{figures['seconds']:.1f}", f"{figures.get('cpu_seconds', 0):.1f}",
            f"{figures.get('peak_multiple', 0):.2f}", f"{figures['weights_gb']:.2f}",
        ]
        for way, figures in result.items()
        if isinstance(figures, dict) and "seconds" in figures and "peak_multiple" in figures
    ]  # fmt: skip
    yield from table(["", "s", "processor s", "peak memory / weights", "weights, GB"], rows)
    yield f"Loading hal's bundle takes {result['loading']['seconds']:.2f} s.\n"
