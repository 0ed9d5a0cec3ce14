import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from hal.cli import _app, main
from hal.errors import CheckFailed, InputError
from tests.cli.conftest import Hal

COMMANDS = ["compile", "run", "serve", "verify", "inspect", "retarget", "bench", "demo"]
TARGET_COMMANDS = ["list", "show", "validate", "schema"]
EVERY = [[c] for c in COMMANDS] + [["targets", c] for c in TARGET_COMMANDS]


@pytest.mark.parametrize("command", EVERY, ids=" ".join)
def test_every_command_has_help_with_an_example_and_json(
    hal_command: Hal, command: list[str]
) -> None:
    result = hal_command(*command, "--help")
    assert result.code == 0
    assert f"Example: hal {' '.join(command)}" in result.out
    assert "--json" in result.out


def test_the_list_of_commands_is_shown_without_arguments(hal_command: Hal) -> None:
    result = hal_command()
    assert result.code == 0
    assert all(command in result.out for command in [*COMMANDS, "targets"])


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["compil"], "No such command 'compil'. Did you mean 'compile'?", "see hal --help"),
        (["compile"], "Missing argument 'MODEL'.", "see hal compile --help"),
        (["run", "x.hal", "--seeed", "1"], "No such option: --seeed", "see hal run --help"),
        (
            ["bench", "x.hal", "--runs", "many"],
            "Invalid value for '--runs'",
            "see hal bench --help",
        ),
    ],
)
def test_wrong_usage_is_told_in_two_lines(
    hal_command: Hal, arguments: list[str], error: str, hint: str
) -> None:
    result = hal_command(*arguments)
    assert result.code == 2
    assert result.out == ""
    first, second = result.err.splitlines()
    assert first.startswith("error: ")
    assert error in first
    assert second == f"hint: {hint}"


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Replace the application by one whose only command raises ``error``."""

    def create() -> typer.Typer:
        app = typer.Typer()

        @app.command()
        def command(word: str) -> None:
            raise error

        return app

    monkeypatch.setattr(_app, "create", create)


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (InputError("x is wrong", "fix x"), 2, ["error: x is wrong", "hint: fix x"]),
        (InputError("two\nlines"), 2, ["error: two lines"]),
        (CheckFailed("too far off", "look"), 1, ["error: too far off", "hint: look"]),
        (KeyboardInterrupt(), 2, ["error: interrupted", "hint: "]),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out.hal"),
            2,
            ["error: out.hal: No space left on device", "hint: check the path, and free space"],
        ),
        (MemoryError(), 2, ["error: not enough memory"]),
        (ValueError("odd\nmore"), 70, ["error: internal: ValueError: odd (test_errors.py:"]),
    ],
)
def test_each_kind_of_failure_has_its_code_and_lines(
    hal_command: Hal,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    lines: list[str],
) -> None:
    failing(monkeypatch, error)
    result = hal_command("go")
    assert result.code == code
    printed = result.err.splitlines()
    for line, start in zip(printed, lines, strict=False):
        assert line.startswith(start)
    assert len(printed) >= len(lines)
    assert "Traceback" not in result.err


def test_an_unexpected_failure_says_that_it_is_a_bug(
    hal_command: Hal, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, ZeroDivisionError("no"))
    assert "hint: this is a bug in hal" in hal_command("go").err


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, InputError("x is wrong"))
    with pytest.raises(InputError):
        main(["--debug", "go"])


def test_a_terminated_command_leaves_through_its_cleanup(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cleaned: list[Callable[[], None] | str] = []

    def create() -> typer.Typer:
        app = typer.Typer()

        @app.command()
        def command(word: str) -> None:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                cleaned.append("cleaned")

        return app

    monkeypatch.setattr(_app, "create", create)
    with pytest.raises(SystemExit) as caught:
        main(["go"])
    assert caught.value.code == 143
    assert cleaned == ["cleaned"]


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m hal.cli targets schema | head -c 1"
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False
    )
    assert result.stderr == ""
