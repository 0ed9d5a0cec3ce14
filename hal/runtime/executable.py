"""Segments of a build run one after the other as one executable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hal.errors import TargetError
from hal.targets.backend import Executable


class SegmentedExecutable(Executable):
    """Runs segments in order, handing values on by name and dropping each after its last use."""

    def __init__(
        self,
        parts: Sequence[tuple[Executable, Sequence[str], Sequence[str]]],
        outputs: Sequence[str],
        in_place: Mapping[str, str] | None = None,
    ) -> None:
        """``in_place``: outputs that callers look for in an input's memory, and that input."""
        self._parts = parts
        self._outputs = outputs
        self._in_place = dict(in_place or {})
        self._closed = False
        last: dict[str, int] = {}
        for index, (_, inputs, _) in enumerate(parts):
            for name in inputs:
                last[name] = index
        keep = {*outputs, *self._in_place}
        self._dead = [
            [name for name, at in last.items() if at == index and name not in keep]
            for index in range(len(parts))
        ]

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Run all segments on the graph's inputs, state included.

        Raises:
            TargetError: the executable was closed, or a segment failed.
        """
        self.require_open()
        values = dict(inputs)
        for (part, names, _), dead in zip(self._parts, self._dead, strict=True):
            values.update(part.run({name: values[name] for name in names}))
            for name in dead:
                values.pop(name, None)
        for output, source in self._in_place.items():
            if output in values:
                _take_over(inputs[source], values[output])
        return {name: values[name] for name in self._outputs}

    def forget_state(self) -> None:
        """Tell every segment."""
        for part, _, _ in self._parts:
            part.forget_state()

    def close(self) -> None:
        """Close every segment."""
        self._closed = True
        for part, _, _ in self._parts:
            part.close()

    def require_open(self) -> None:
        """Refuse what a closed session cannot do.

        Raises:
            TargetError: the executable was closed.
        """
        if self._closed:
            raise TargetError("the session is closed", "open a new one: bundle.session()")


def _take_over(memory: Any, result: Any) -> None:
    """Put a result where it is looked for, unless it is there: another process cannot write it."""
    if result is not memory and not np.may_share_memory(memory, result):
        memory[...] = result
