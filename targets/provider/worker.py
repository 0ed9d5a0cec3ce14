"""A worker process that holds a provider."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from hal.errors import TargetError
from hal.targets.process import Supervised
from hal.targets.provider import wire

SCRIPT = Path(__file__).with_name("serve.py")


class Worker(Supervised):
    """``serve.py`` under an interpreter that has the vendor's packages."""

    def __init__(self, python: Path, what: str, variables: Mapping[str, str] | None = None) -> None:
        super().__init__([str(python), str(SCRIPT)], what, variables)

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
            wire.send(stdin, head, dict(arrays or {}))
            return wire.receive(stdout)

        told, given = self.exchange(head["do"], limit, talk)
        if "error" in told:
            raise TargetError(
                f"{self._what} failed at {head['do']!r}: {_sentence(told['error'])}",
                "compile with fallback, or choose another target",
            )
        return told, given


def _sentence(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = lines[0] if lines else text
    return first.rsplit("[ONNXRuntimeError] : ", 1)[-1].rstrip(".")
