"""Running others' code in a process of its own: what crashes or hangs there is told in a line.

A backend from another package may end the process it runs in. Commands whose work meets such a
backend do that work in a copy of their process, which nothing of the backend has touched yet::

    guarded(lambda report: compile_it(report), "backend 'npu' of npu-kit 1.0", limit=600)
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import hal.errors
from hal.errors import HalError, TargetError

T = TypeVar("T")
Report = Callable[[str], None]
"""Called with a sentence about what is being done, which an error then names."""

_CAN_COPY = hasattr(os, "fork")


def guarded(
    work: Callable[[Report], T], blamed: str, limit: float | None = None, *, theirs: bool = True
) -> T:
    """What ``work`` returns (or raises), run in a copy of this process.

    ``blamed`` is named if the process dies or takes longer than ``limit`` seconds. What it prints
    appears as if it were printed here. On a system that cannot copy processes it runs in this one.
    ``theirs``: others' code takes part, so what is no error of hal counts as that code's fault.

    Raises:
        TargetError: the process died, or took too long, or others' code raised something.
    """
    if not _CAN_COPY:
        return work(lambda _: None)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # what waits there would be printed by both
    pipe, other = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_work, args=(other, work))
    process.start()
    other.close()
    end = None if limit is None else time.monotonic() + limit
    doing = ""
    try:
        while True:
            left = None if end is None else max(0.0, end - time.monotonic())
            if not multiprocessing.connection.wait([pipe], timeout=left):
                raise TargetError(
                    f"{blamed} ran past the time limit of {limit:g} s{doing}",
                    "give it longer, or ask its maker why it hangs",
                )
            try:
                kind, value = pipe.recv()
            except EOFError:
                raise _death(process, blamed, doing) from None
            if kind == "doing":
                doing = f" while {value}" if value else ""
            elif kind in ("stdout", "stderr"):
                getattr(sys, kind).write(value)
            elif kind == "document":
                getattr(sys.stdout, "document", sys.stdout.write)(value)
            elif kind == "raised":
                error = _restored(value)
                if theirs and isinstance(error, Exception) and not isinstance(error, HalError):
                    raise _failure(error, blamed, doing) from error
                raise error
            else:
                process.join()
                found: T = value
                return found
    finally:
        pipe.close()
        if process.is_alive():
            process.terminate()
            process.join(timeout=5)
            process.kill()
        process.join()


def _failure(error: Exception, blamed: str, doing: str) -> TargetError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = f"{type(error).__name__}: {' '.join(lines) or 'no message'}"
    return TargetError(
        f"{blamed} failed{doing}: {told[:300]}",
        "what it gave or raised does not keep its contract (docs/vendors.md): report it to its"
        " maker; --debug shows where",
    )


def _death(process: Any, blamed: str, doing: str) -> TargetError:
    process.join()
    code = process.exitcode
    how = f"exit code {code}"
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            how = signal.Signals(-code).name
    return TargetError(
        f"{blamed} ended the process ({how}){doing}",
        "this is a fault of that software: report it to its maker; other targets are not affected",
    )


def _work(pipe: multiprocessing.connection.Connection, work: Callable[[Report], Any]) -> None:
    for name in ("stdout", "stderr"):
        # Where a stream is not the terminal or file that this process shares, it is in memory.
        if getattr(sys, name) is not getattr(sys, f"__{name}__"):
            setattr(sys, name, _Relay(pipe, name))
    try:
        message: tuple[str, Any] = (
            "returned",
            work(lambda sentence: pipe.send(("doing", sentence))),
        )
    except KeyboardInterrupt:
        return  # the process that waits has it, too, and says so
    except HalError as error:
        message = ("raised", (type(error).__name__, error.message, error.hint))
    except Exception as error:  # noqa: BLE001 - raised again where it is waited for
        message = ("raised", error)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    try:
        pipe.send(message)
    except Exception:  # noqa: BLE001 - an exception may hold what cannot be sent
        held = message[1]
        pipe.send(("raised", RuntimeError(f"{type(held).__name__}: {held}")))


def _restored(value: Any) -> BaseException:
    """An error of hal by the name of its class; others came whole."""
    if isinstance(value, BaseException):
        return value
    name, message, hint = value
    found = getattr(hal.errors, name, HalError)
    error: HalError = found.__new__(found)
    HalError.__init__(error, message, hint)
    return error


class _Relay(io.TextIOBase):
    """A stream whose text goes through a pipe."""

    def __init__(self, pipe: multiprocessing.connection.Connection, name: str) -> None:
        self._pipe, self._name = pipe, name

    def write(self, text: str) -> int:
        self._pipe.send((self._name, text))
        return len(text)

    def writable(self) -> bool:
        return True

    def document(self, text: str) -> None:
        """Whole text that stdout may tell from what others print: see ``hal.cli._output``."""
        self._pipe.send(("document", text))
