"""Carried state of one session, kept as values of the runtime between calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort

from hal.errors import InputError
from hal.ir import State
from hal.ir.ortvalue import from_ort, to_ort
from hal.targets.backend import StateStore
from hal.targets.onnxruntime.shared_cache import LAST, NEW, PAST, TOTAL, SharedCache

_STEP = 256
"""Buffers grow to a multiple of this many positions, and by half at least."""

_AXIS = 2  # growth axis of shared buffers: [batch, head, position, channel]


class OrtState(StateStore):
    """Carried tensors that are never copied from call to call.

    Caches of attention are buffers with room, written in place; of the rest one call's output
    is the next call's input.
    """

    def __init__(
        self, state: tuple[State, ...], inputs: Mapping[str, Any], shared: SharedCache | None
    ) -> None:
        self._state = {item.name: item for item in state}
        self._inputs = inputs
        self._shared = shared
        self._in_place = set(shared.states) if shared else set()
        self._values: dict[str, ort.OrtValue] = {}
        self._length = 0
        self._new = 0

    def reset(self) -> None:
        """Forget everything; buffers are kept for the next sequence."""
        self._values = {n: v for n, v in self._values.items() if n in self._in_place}
        self._length = 0

    def feeds(self, given: Mapping[str, ort.OrtValue]) -> dict[str, ort.OrtValue]:
        """State inputs of the next call, and the lengths that buffers need."""
        extents = self._extents(given)
        feeds: dict[str, ort.OrtValue] = {}
        if self._shared is not None:
            batch = given[self._shared.batch[0]].shape()[self._shared.batch[1]]
            self._new = given[self._shared.sequence[0]].shape()[self._shared.sequence[1]]
            total = self._length + self._new
            self._reserve(batch, total)
            feeds[PAST] = to_ort(np.array([self._length], np.int64))
            feeds[LAST] = to_ort(np.full(batch, total - 1, np.int32))
            feeds[TOTAL] = to_ort(np.array(total, np.int32))
            feeds[NEW] = to_ort(np.full(batch, self._new, np.int32))
        for name, item in self._state.items():
            if name not in self._values:
                self._values[name] = to_ort(self._zeros(item, extents))
            feeds[item.input] = self._values[name]
        return feeds

    def outputs(self) -> dict[str, ort.OrtValue]:
        """State outputs that are written into buffers."""
        return {self._state[name].output: self._values[name] for name in self._in_place}

    def take(self, results: dict[str, ort.OrtValue]) -> None:
        """Move the other state outputs out of ``results``, and count the new positions."""
        for name, item in self._state.items():
            if name not in self._in_place:
                self._values[name] = results.pop(item.output)
        self._length += self._new
        self._new = 0

    def export_array(self, name: str) -> np.ndarray:
        """The state in neutral layout (a copy).

        Raises:
            InputError: there is no such state, or nothing was run yet.
        """
        if name not in self._values:
            raise InputError(f"state {name!r} is empty or unknown", "run the session first")
        array = np.asarray(from_ort(self._values[name]))
        return np.array(array[:, :, : self._length] if name in self._in_place else array)

    def import_array(self, name: str, array: np.ndarray) -> None:
        """Replace the state ``name``; the array is copied.

        Raises:
            InputError: there is no such state.
        """
        if name not in self._state:
            raise InputError(f"there is no state {name!r}", "known: " + ", ".join(self._state))
        if name in self._in_place:
            self._length = array.shape[_AXIS]
            self._values[name] = _buffer(array, _rounded(self._length + 1))
        else:
            self._values[name] = to_ort(np.array(array))

    def _reserve(self, batch: int, total: int) -> None:
        """Give every buffer room for ``total`` positions of ``batch`` rows; what is valid stays."""
        for name in self._in_place:
            buffer = self._values.get(name)
            if buffer is None or (buffer.shape()[0] != batch and not self._length):
                dims = list(self._inputs[self._state[name].input].shape)
                empty = np.zeros((batch, dims[1], 0, dims[3]), np.float32)
                self._values[name] = _buffer(empty, _rounded(total))
            elif buffer.shape()[0] != batch:
                raise InputError(
                    f"the batch is {batch}, the carried state has {buffer.shape()[0]}",
                    "reset the state before another batch size",
                )
            elif buffer.shape()[_AXIS] < total:
                capacity = max(total, buffer.shape()[_AXIS] * 3 // 2)
                valid = np.asarray(from_ort(buffer))[:, :, : self._length]
                self._values[name] = _buffer(valid, _rounded(capacity))

    def _extents(self, given: Mapping[str, ort.OrtValue]) -> dict[str, int]:
        extents: dict[str, int] = {}
        for name, value in given.items():
            for dim, extent in zip(self._inputs[name].shape, value.shape(), strict=False):
                if isinstance(dim, str):
                    extents[dim] = extent
        return extents

    def _zeros(self, item: State, extents: Mapping[str, int]) -> np.ndarray:
        """What a state holds before the first call."""
        declared = self._inputs[item.input]
        shape = [
            0 if axis == item.growth_axis else dim if isinstance(dim, int) else extents.get(dim, 1)
            for axis, dim in enumerate(declared.shape)
        ]
        dtype = declared.type[len("tensor(") : -1]
        return np.zeros(shape, {"float": "float32", "double": "float64"}.get(dtype, dtype))


def _rounded(positions: int) -> int:
    return -(-positions // _STEP) * _STEP


def _buffer(valid: np.ndarray, capacity: int) -> ort.OrtValue:
    """A buffer of ``capacity`` positions that starts with ``valid``."""
    shape = list(valid.shape)
    shape[_AXIS] = capacity
    buffer = np.zeros(shape, valid.dtype)
    buffer[:, :, : valid.shape[_AXIS]] = valid
    return to_ort(buffer)
