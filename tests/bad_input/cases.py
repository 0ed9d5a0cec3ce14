"""Wrong input of every kind: one sentence that names the thing and the place, and what to do.

Each case is tried through the Python API and through the command line, and must leave the disk as
it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

import hal
from hal.cli import main

ROUTE = "host:onnxruntime"


@dataclasses.dataclass(frozen=True)
class Case:
    """What goes wrong: how to prepare it, and what the message and the hint must say.

    ``make`` gets an empty folder and returns the model (or bundle) to use; ``target`` is what to
    compile for. ``says`` are parts of the message, ``hint`` is a part of the hint.
    """

    name: str
    error: type[hal.HalError]
    make: Callable[[Path], str | Path]
    says: tuple[str, ...]
    hint: str
    target: str = ROUTE


def cases(items: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in items])


def check_text(case: Case, message: str, hint: str) -> None:
    for part in case.says:
        assert part in message
    assert case.hint in hint
    assert "\n" not in message.strip()
    assert len(message) < 600


def check_cli(
    case: Case, arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 2
) -> None:
    """The command must print ``error: …`` and ``hint: …`` on stderr and nothing on stdout."""
    capsys.readouterr()
    assert main(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert [line.split(" ")[0] for line in lines] == ["error:", "hint:"], err
    assert "Traceback" not in err
    assert "internal" not in lines[0]
    check_text(case, lines[0], lines[1])
