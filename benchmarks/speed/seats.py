"""Which contenders stay loaded from turn to turn: all of them, as long as memory is plenty."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

from speed.cells import Contender
from speed.failures import Unavailable
from speed.worker import Worker

PLENTY = 4 << 30
"""Bytes of free memory below which a contender is loaded for each of its turns anew."""


class Seats:
    """Processes of a group; ends them all when it is left."""

    def __init__(self, start: Callable[[Contender], Worker]) -> None:
        self._start = start
        self._stack = contextlib.ExitStack()
        self._loaded: dict[str, Worker] = {}
        self.failed: dict[str, str] = {}
        self.load_seconds: dict[str, float] = {}

    def load(self, contenders: Sequence[Contender], say: Callable[[str], None]) -> None:
        """Load as many as there is memory for; why others cannot run is in :attr:`failed`."""
        for contender in contenders:
            say(f"loading {contender.name}")
            if contender.lacking:
                self.failed[contender.name] = contender.lacking
            elif available() >= PLENTY:
                try:
                    self._loaded[contender.name] = self._stack.enter_context(self._begin(contender))
                except Unavailable as error:
                    self.failed[contender.name] = str(error)

    @contextlib.contextmanager
    def turn(self, contender: Contender) -> Iterator[tuple[Worker, bool]]:
        """A contender's process, and whether it is a new one that has yet to be warmed up.

        Raises:
            Unavailable: it has to be started, and cannot.
        """
        if contender.name in self._loaded:
            yield self._loaded[contender.name], False
            return
        with self._begin(contender) as worker:
            yield worker, True

    def _begin(self, contender: Contender) -> Worker:
        worker = self._start(contender)
        self.load_seconds.setdefault(contender.name, worker.facts["load_seconds"])
        return worker

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def available() -> int:
    """Bytes of memory that a new process could have; plenty where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return PLENTY
    found = next(line for line in lines if line.startswith("MemAvailable"))
    return int(found.split()[1]) * 1024
