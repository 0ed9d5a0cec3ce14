"""Printing: tables and sentences for people, one JSON document for programs, errors on stderr."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TextIO

NOTE = "note: "
_STDOUT = 1


class _Documents(io.TextIOBase):
    """What stdout is with ``--json``: documents go there, what else is printed goes to stderr."""

    def __init__(self, goal: TextIO) -> None:
        self._goal, self.any = goal, False

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()

    def document(self, text: str) -> None:
        """Print a document, now."""
        self.any = True
        self._goal.write(text)
        self._goal.flush()


@contextlib.contextmanager
def json_alone() -> Iterator[None]:
    """Keep stdout for JSON documents: what libraries and plug-ins print goes to stderr."""
    goal = sys.stdout
    goal.flush()
    with contextlib.ExitStack() as stack:
        # Text of C libraries and child processes too, unless stdout is a stand-in without a number.
        if _number(goal) == _STDOUT and _number(sys.stderr) is not None:
            goal = stack.enter_context(os.fdopen(os.dup(_STDOUT), "w", encoding="utf-8"))
            os.dup2(sys.stderr.fileno(), _STDOUT)
            stack.callback(os.dup2, goal.fileno(), _STDOUT)
        stack.enter_context(contextlib.redirect_stdout(_Documents(goal)))
        yield


def _number(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError):
        return None


def print_json(value: Any) -> None:
    """Print one JSON document on stdout."""
    text = json.dumps(value, indent=2, default=str, allow_nan=False) + "\n"
    getattr(sys.stdout, "document", sys.stdout.write)(text)


def print_line(text: str = "") -> None:
    """Print a line on stdout, as it is."""
    sys.stdout.write(text + "\n")


def print_error(message: str, hint: str = "") -> None:
    """Print ``error: …`` and ``hint: …`` on stderr, one line each.

    A command with ``--json`` that has printed no document prints both as one.
    """
    message, hint = (" ".join(text.split()) for text in (message, hint))
    sys.stderr.write(f"error: {message}\n" + (f"hint: {hint}\n" if hint else ""))
    sys.stderr.flush()
    if isinstance(sys.stdout, _Documents) and not sys.stdout.any:
        print_json({"error": message, "hint": hint})


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table; columns whose cells are all numbers are aligned to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    cells = [[_cell(value) for value in row] for row in rows]
    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        numeric = bool(cells) and all(_is_number(row[index]) for row in cells)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        table.add_row(*row)
    console = Console(file=sys.stdout, highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 160
    console.print(table)


def print_facts(title: str, facts: Iterable[tuple[str, Any]]) -> None:
    """Print names and values below each other; values that are None or empty are left out."""
    shown = [(name, value) for name, value in facts if value not in (None, "", [], {}, ())]
    width = max((len(name) for name, _ in shown), default=0)
    if title:
        print_line(title)
    for name, value in shown:
        print_line(f"  {name:<{width}}  {value}")


def format_bytes(count: float | None) -> str:
    """``1.5 MiB``."""
    if count is None:
        return "?"
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def format_seconds(seconds: float | None) -> str:
    """``12.3 ms``."""
    if seconds is None:
        return "?"
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns" if seconds else "0 s"


@contextlib.contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """Yield a function that shows what is being done: a spinner on a terminal, else nothing.

    Sentences that begin with ``note:`` stay on stderr, terminal or not.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda sentence: None if quiet else _stay(sentence)
        return
    from rich.console import Console

    with Console(stderr=True, highlight=False).status("starting") as status:

        def show(sentence: str) -> None:
            if sentence.startswith(NOTE):
                status.console.print(sentence, markup=False)
            else:
                status.update(sentence)

        yield show


def _stay(sentence: str) -> None:
    if sentence.startswith(NOTE):
        sys.stderr.write(sentence + "\n")
        sys.stderr.flush()


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _is_number(text: str) -> bool:
    return text == "-" or text[:1].isdigit()
