"""Work in a process of its own: what it returns, raises and prints, and what becomes of a crash."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

import pytest

from hal.errors import InputError, MissingExtraError, TargetError
from hal.targets import guarded

Report = Callable[[str], None]


def test_what_work_returns_comes_back_and_what_it_changes_does_not() -> None:
    seen: list[int] = []

    def work(report: Report) -> list[int]:
        seen.append(os.getpid())
        return seen

    assert guarded(work, "it") != [os.getpid()]
    assert seen == []


def test_what_work_prints_appears_here(capsys: pytest.CaptureFixture[str]) -> None:
    def work(report: Report) -> None:
        print("a line")
        print("a complaint", file=sys.stderr)

    guarded(work, "it")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("a line\n", "a complaint\n")


@pytest.mark.parametrize(
    "error",
    [
        InputError("x is wrong", "make it right"),
        MissingExtraError("speaking", "voice"),
        ValueError("another library's"),
    ],
)
def test_errors_of_hals_own_work_come_back_as_they_are(error: Exception) -> None:
    def work(report: Report) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        guarded(work, "it", theirs=False)
    assert str(caught.value) == str(error)
    assert getattr(caught.value, "hint", None) == getattr(error, "hint", None)


def test_what_others_code_raises_is_told_as_theirs() -> None:
    def work(report: Report) -> None:
        report("running")
        raise KeyError("Conv\nand more")

    with pytest.raises(TargetError) as caught:
        guarded(work, "backend 'npu' of npu-kit 1.0")
    told = caught.value.message
    assert told.startswith("backend 'npu' of npu-kit 1.0 failed while running: KeyError: 'Conv")
    assert "and more" in told

    def refused(report: Report) -> None:
        raise InputError("x is wrong", "make it right")

    with pytest.raises(InputError, match="x is wrong"):
        guarded(refused, "backend 'npu'")


def test_an_error_that_cannot_be_sent_is_told_in_words() -> None:
    class LocalError(Exception):
        pass

    def work(report: Report) -> None:
        raise LocalError("of this function only")

    with pytest.raises(RuntimeError, match="LocalError: of this function only"):
        guarded(work, "it", theirs=False)
    with pytest.raises(TargetError, match="it failed: RuntimeError: LocalError: of this function"):
        guarded(work, "it")


@pytest.mark.parametrize(
    ("end", "how"),
    [
        (lambda: os._exit(7), "exit code 7"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL"),
    ],
)
def test_a_process_that_dies_is_told_with_what_it_was_doing(
    end: Callable[[], None], how: str
) -> None:
    def work(report: Report) -> None:
        report("reading")
        report("building")
        end()

    with pytest.raises(TargetError) as caught:
        guarded(work, "backend 'npu'")
    assert caught.value.message == f"backend 'npu' ended the process ({how}) while building"


def test_a_process_that_hangs_is_ended() -> None:
    with pytest.raises(TargetError, match=r"it ran past the time limit of 0\.2 s"):
        guarded(lambda report: time.sleep(3600), "it", 0.2)
