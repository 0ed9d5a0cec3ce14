"""A process that may crash or hang without harm to this one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Self, TypeVar

from hal.errors import TargetError

T = TypeVar("T")


class Supervised:
    """A process that is spoken to on its stdin and stdout.

    What it says on stderr is kept, and told when it dies. ``what`` names the target in messages.
    """

    def __init__(
        self, command: Sequence[str], what: str, variables: Mapping[str, str] | None = None
    ) -> None:
        """Start the command.

        Raises:
            TargetError: it cannot start.
        """
        self._what = what
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._messages,
                env={**kept, **(variables or {})}, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise TargetError(
                f"the worker of {what} cannot start: {error}", f"hal targets setup {what}"
            ) from error

    def exchange(
        self, doing: str, limit: float, talk: Callable[[IO[bytes], IO[bytes]], T | None]
    ) -> T:
        """What ``talk`` makes of the process's stdin and stdout, in at most ``limit`` seconds.

        ``talk`` returns None where the process has closed its end.

        Raises:
            TargetError: the process dies, or does not answer in time; it is gone then.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._kill()

        timer = threading.Timer(limit, stop)
        timer.start()
        answer = None
        try:
            with contextlib.suppress(BrokenPipeError):
                answer = talk(self._process.stdin, self._process.stdout)
        finally:
            timer.cancel()
        if late.is_set():
            raise TargetError(
                f"the worker of {self._what} did not finish {doing!r} in {limit:g} s",
                "give it a larger limit in its descriptor, or a smaller model",
            )
        if answer is None:
            raise TargetError(
                f"the worker of {self._what} died during {doing!r}: {self._death()}",
                "this is the vendor's software; try another version of it or another route",
            )
        return answer

    @property
    def running(self) -> bool:
        """Whether the process is still there."""
        return self._process.poll() is None

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
