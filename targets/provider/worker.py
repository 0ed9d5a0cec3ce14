"""A worker process that holds a provider."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from hal.errors import TargetError
from hal.targets.backend import Executable
from hal.targets.process import Supervised
from hal.targets.provider import wire

SCRIPT = Path(__file__).with_name("serve.py")


class Worker(Supervised):
    """A script that serves requests, under an interpreter that has the vendor's packages."""

    def __init__(
        self,
        python: Path,
        what: str,
        variables: Mapping[str, str] | None = None,
        script: Path | None = None,
    ) -> None:
        super().__init__([str(python), str(script or SCRIPT)], what, variables)

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

        def talk(
            stdin: IO[bytes], stdout: IO[bytes]
        ) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
            wire.send(stdin, {**head, "seconds": limit}, dict(arrays or {}))
            return wire.receive(stdout)

        told, given = self.exchange(head["do"], limit, talk)
        if "error" in told:
            raise TargetError(
                f"{self._what} failed at {head['do']!r}: {_sentence(told['error'])}",
                "compile with fallback, or choose another target",
            )
        return told, given


class Remote(Executable):
    """A segment in a worker."""

    def __init__(self, worker: Worker, record: Mapping[str, Any], seconds: float) -> None:
        self._worker, self._seconds = worker, seconds
        self._inputs: Mapping[str, str] = record["inputs"]
        self._outputs: list[str] = list(record["outputs"])

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Send arrays, wait for arrays."""
        arrays = {name: np.asarray(inputs[name]) for name in self._inputs}
        head = {"do": "run", "outputs": self._outputs}
        _, results = self._worker.ask(head, arrays, limit=self._seconds)
        return dict(results)

    def close(self) -> None:
        """End the worker."""
        self._worker.close()


def _sentence(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = lines[0] if lines else text
    return first.rsplit("[ONNXRuntimeError] : ", 1)[-1].rstrip(".")
