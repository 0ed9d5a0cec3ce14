"""What the scripts of workers share: the loop over requests, and listening to native code.

It runs as a plain file next to ``wire.py``, in an environment without hal.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import wire  # type: ignore[import-not-found]

_GRACE = 5
"""Seconds in which the other side ends this process itself."""


@contextlib.contextmanager
def printed() -> Iterator[list[str]]:
    """What native code prints to stdout and stderr inside the block; there once it is left."""
    told: list[str] = []
    sys.stdout.flush()
    sys.stderr.flush()
    kept = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    with tempfile.TemporaryFile() as file:
        for descriptor in kept:
            os.dup2(file.fileno(), descriptor)
        try:
            yield told
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, copy in kept.items():
                os.dup2(copy, descriptor)
                os.close(copy)
            file.seek(0)
            told.append(file.read().decode(errors="replace"))


def serve(make: Callable[[], Any]) -> None:
    """Answer with methods of what ``make`` returns until the other side closes its end.

    A method takes a request's head and arrays; it returns the answer's head, or head and arrays.
    What it raises is told to the other side, which has the context. A request that takes much
    longer than its ``seconds`` ends the process: the other side may be gone, and native code that
    hangs notices nothing.
    """
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    server = None
    while (message := wire.receive(sys.stdin.buffer)) is not None:
        head, arrays = message
        _end_after(head.pop("seconds", 0))
        try:
            server = server or make()
            result = getattr(server, head["do"])(head, arrays)
            told, given = result if isinstance(result, tuple) else (result, {})
        except Exception as error:  # noqa: BLE001 - told to the other side
            told, given = {"error": f"{type(error).__name__}: {error}"}, {}
        _end_after(0)
        wire.send(answers, told, given)


def _end_after(seconds: float) -> None:
    """Have the operating system end this process then; 0: not any more."""
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(seconds) + _GRACE if seconds else 0)
