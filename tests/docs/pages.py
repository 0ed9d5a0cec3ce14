"""Reads a Markdown page into blocks, and runs them.

The convention, so that pages stay plain Markdown:

* the blocks of a page run in order, share one namespace and start in one empty folder;
* ``python`` blocks are executed; a block of any language whose first line is ``# file: NAME`` is
  written to that file instead;
* in ``console`` blocks a line ``$ hal …`` runs through the command line; the lines below it must
  occur in what it prints, spaces apart, ``…`` standing for anything; of ``$ hal serve`` only the
  options are checked; ``$ pytest …`` runs in a process of its own, where the folder can be imported
  from; ``$ make …`` must name a target
  of the Makefile, ``$ pip install …`` extras that exist, ``$ python FILE`` a file of the repository;
* ``<!-- setup`` … ``-->`` is Python that a reader does not need to see;
* blocks of other languages are for reading.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\s*$")
_FILE = re.compile(r"^# file: (\S+)$")


@dataclasses.dataclass(frozen=True)
class Block:
    """One fenced block or hidden set-up; ``line`` is where its text begins."""

    page: str
    line: int
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """Name of the file that the block is the content of."""
        found = _FILE.match(self.text.split("\n", 1)[0])
        return found[1] if found else None


def pages() -> list[Path]:
    """Every page whose blocks are run."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page in order."""
    name = page.relative_to(ROOT).as_posix()
    language, start, lines = "", 0, list[str]()
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = _FENCE.match(line)
        closed = line.strip() == "-->" if language == "setup" else line.strip() == "```"
        if start and closed:
            yield Block(name, start, language, "\n".join(lines))
            start = 0
        elif start:
            lines.append(line)
        elif line.strip() == "<!-- setup":
            language, start, lines = "setup", number + 1, []
        elif fence:
            language, start, lines = fence["language"] or "text", number + 1, []
    assert not start, f"{name}:{start}: the block is not closed"


def run_page(page: Path, folder: Path) -> int:
    """Run the blocks of a page in ``folder`` (the working directory); return how many ran."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    count = 0
    for block in blocks(page):
        if block.file:
            (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.file).write_text(block.text + "\n")
        elif block.language in ("python", "setup"):
            source = "\n" * (block.line - 1) + block.text
            exec(compile(source, str(ROOT / block.page), "exec"), namespace)  # noqa: S102
        elif block.language == "console":
            _run_console(block)
        else:
            continue
        count += 1
    return count


def _run_console(block: Block) -> None:
    commands: list[tuple[int, str, list[str]]] = []
    for number, line in enumerate(block.text.splitlines(), block.line):
        if line.startswith("$ "):
            commands.append((number, line[2:], []))
        elif commands and commands[-1][1].endswith("\\"):
            number, command, shown = commands.pop()
            commands.append((number, command[:-1] + line, shown))
        elif line.strip():
            assert commands, f"{block.page}:{number}: a console block starts with '$ '"
            commands[-1][2].append(line)
    for number, command, shown in commands:
        _run_command(f"{block.page}:{number}", command, shown)


def _run_command(place: str, command: str, shown: list[str]) -> None:
    words = shlex.split(command, comments=True)
    match words[0]:
        case "hal" if words[1] == "serve":  # would not end
            _require_options(place, words[1], words[2:])
        case "hal":
            _run_hal(place, words[1:], shown)
        case "pytest":
            environment = {**os.environ, "PYTHONPATH": "."}
            words = [sys.executable, "-m", *words, "-p", "no:cacheprovider"]
            done = subprocess.run(
                words, capture_output=True, text=True, env=environment, check=False
            )
            assert done.returncode == 0, f"{place}: {done.stdout}{done.stderr}"
            _require_shown(place, done.stdout, shown)
        case "make":
            targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
            named = {word for word in words[1:] if "=" not in word}
            assert named <= targets, f"{place}: the Makefile has no {named - targets}"
        case "pip":
            extras = set(_project()["optional-dependencies"])
            asked = {
                name for found in re.findall(r"\[(.*?)\]", command) for name in found.split(",")
            }
            assert asked <= extras, f"{place}: there are no extras {asked - extras}"
        case "python":
            assert (ROOT / words[1]).is_file(), f"{place}: there is no {words[1]}"
        case "git" | "cd":
            pass
        case other:
            raise AssertionError(f"{place}: {other!r} is not run by the tests of the documentation")


def _require_options(place: str, command: str, words: list[str]) -> None:
    import typer

    from hal.cli._app import create

    parent = typer.main.get_command(create())
    known = {name for option in parent.commands[command].params for name in option.opts}
    asked = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert asked <= known, f"{place}: hal {command} has no {sorted(asked - known)}"


def _run_hal(place: str, arguments: list[str], shown: list[str]) -> None:
    from hal.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    printed = out.getvalue() + err.getvalue()
    wrong = any(line.startswith("error:") for line in shown)
    assert (code != 0) == wrong, f"{place}: exit code {code}\n{printed}"
    _require_shown(place, printed, shown)


def _require_shown(place: str, printed: str, shown: list[str]) -> None:
    actual = [" ".join(line.split()) for line in printed.splitlines()]
    for line in shown:
        parts = [re.escape(part) for part in " ".join(line.split()).split("…")]
        pattern = re.compile(".*".join(parts))
        found = any(pattern.fullmatch(text) for text in actual)
        assert found, f"{place}: {line!r} was not printed, but:\n{printed}"


def _project() -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project
