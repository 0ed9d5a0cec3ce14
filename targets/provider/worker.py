"""A process in which a vendor's software may crash or hang without harm to this one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from hal.errors import TargetError
from hal.targets.provider import wire

SCRIPT = Path(__file__).with_name("serve.py")


class Worker:
    """One worker process and what it is asked.

    A request that takes longer than its limit, or a process that dies, is a :class:`TargetError`
    that says so; the worker is gone then.
    """

    def __init__(self, python: Path, what: str, variables: Mapping[str, str] | None = None) -> None:
        """Start ``python`` on ``serve.py``; ``what`` names the target in messages."""
        self._what = what
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        try:
            self._process = subprocess.Popen(
                [str(python), str(SCRIPT)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._messages,
                env={**kept, **(variables or {})}, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise TargetError(
                f"the worker of {what} cannot start: {error}", f"hal targets setup {what}"
            ) from error

    def ask(
        self,
        head: dict[str, Any],
        arrays: Mapping[str, np.ndarray] | None = None,
        *,
        limit: float,
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Send a request and wait for its answer, at most ``limit`` seconds.

        Raises:
            TargetError: the worker says what is wrong, dies, or does not answer in time.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._kill()

        timer = threading.Timer(limit, stop)
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                wire.send(self._process.stdin, head, dict(arrays or {}))
            answer = wire.receive(self._process.stdout)
        finally:
            timer.cancel()
        if late.is_set():
            raise TargetError(
                f"the worker of {self._what} did not finish {head['do']!r} in {limit:g} s",
                "give it a larger limit in its descriptor, or a smaller model",
            )
        if answer is None:
            raise TargetError(
                f"the worker of {self._what} died during {head['do']!r}: {self._death()}",
                "this is the vendor's software; try another version of it or another route",
            )
        told, given = answer
        if "error" in told:
            raise TargetError(
                f"{self._what} failed at {head['do']!r}: {_sentence(told['error'])}",
                "compile with fallback, or choose another target",
            )
        return told, given

    def close(self) -> None:
        """End the process."""
        self._kill()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError, ValueError):
                if stream is not None:
                    stream.close()
        self._messages.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self._kill()

    def _kill(self) -> None:
        if self._process.poll() is None:
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _death(self) -> str:
        code = self._process.wait()
        self._messages.seek(0)
        lines = self._messages.read().decode(errors="replace").strip().splitlines()
        if code < 0:
            name = signal.Signals(-code).name
            return f"signal {name}" + (f", last words: {lines[-1]}" if lines else "")
        return lines[-1] if lines else f"exit code {code}"


def _sentence(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = lines[0] if lines else text
    return first.rsplit("[ONNXRuntimeError] : ", 1)[-1].rstrip(".")
