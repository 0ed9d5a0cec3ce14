"""A contender's process, seen from here; the other side is ``workers/protocol.py``.

Between its turns a process is stopped (SIGSTOP), threads and all: thread pools that spin while
they wait would take the processor from whoever has the turn.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from speed.failures import Unavailable, reason

WORKERS = Path(__file__).resolve().parent / "workers"
LOADING_LIMIT, ANSWER_LIMIT = 600.0, 900.0
_TOLD = 300


class Worker:
    """Starts a process; :meth:`ask` lets it run for one command."""

    def __init__(self, python: Path, script: str, options: Mapping[str, Any]) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in close()
        threads = str(options["threads"])
        limits = {f"{name}_NUM_THREADS": threads for name in ("OMP", "MKL", "OPENBLAS", "TVM")}
        self.started = time.perf_counter()
        self._process = subprocess.Popen(
            [str(python), str(WORKERS / script), json.dumps(options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env={**os.environ, **limits, "HF_HUB_OFFLINE": "1"}, start_new_session=True,
            cwd=tempfile.gettempdir(),  # modules that lie here must not be taken for packages
        )  # fmt: skip
        try:
            self.facts = self._answer(LOADING_LIMIT)
        except BaseException:
            self.close()
            raise
        self._stop()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Run one command.

        Raises:
            Unavailable: it failed, died, or took too long; the process is then of no more use.
        """
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        try:
            return self._answer(ANSWER_LIMIT)
        finally:
            self._stop()

    def _answer(self, limit: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], limit)
        if not ready:
            raise Unavailable(f"no answer in {limit:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            ended = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise Unavailable(f"its process ended with {ended}: {reason(self._messages())}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            # A type alone says little; what the runtime wrote before may say why.
            raise Unavailable(" ".join(answer["error"].split())[:_TOLD])
        return answer

    def _messages(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _stop(self) -> None:
        """Stop the process, and wait until it has stopped (or ended)."""
        self._signal(signal.SIGSTOP)
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def close(self) -> None:
        """End the process and what it started."""
        if self._process.returncode is None:
            self._signal(signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            with contextlib.suppress(BrokenPipeError):
                if stream is not None:
                    stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
