"""A loaded program that takes and gives NumPy arrays."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hal.errors import InputError
from hal.targets.detect import usable_cores
from hal.targets.tvm import runtime
from hal.targets.tvm.runtime import ALIGNMENT
from hal.targets.tvm.storage import from_storage, to_storage
from hal.targets.tvm.weights import shared_tensor

STEP = "step"
"""The function for one token of one row."""

_SMALL = 64
"""Bytes of an input up to which its tensor is kept, of each shape: there are few such shapes."""


@dataclasses.dataclass(frozen=True)
class Port:
    """An input or output of the program: its name, and that of its ONNX dtype."""

    name: str
    dtype: str


_LIMITED = any(name in os.environ for name in ("TVM_NUM_THREADS", "OMP_NUM_THREADS"))
"""The user has said how many threads there are to be, in what TVM reads itself."""


def use_threads(count: int | None) -> None:
    """Size the pool that this thread's kernels run on; None: as the environment says, or all cores.

    A pool never grows beyond what the environment says when it is made, and by itself it takes
    half of the processors where it supposes two threads on each core.
    """
    if count is None and _LIMITED:
        return
    cores = usable_cores()
    os.environ["TVM_NUM_THREADS"] = str(max(count or cores, cores))
    runtime.global_function("runtime.config_threadpool")(1, count or cores)


class Program:
    """``main`` of a Relax virtual machine with its weights.

    On a ``device`` with ``own_memory``, weights are copied there once; inputs, pools included, are
    copied there in each call, and outputs and pools back.
    """

    def __init__(
        self,
        library: Any,
        inputs: Sequence[Port],
        outputs: Sequence[Port],
        weights: Sequence[runtime.Tensor],
        alive: Any = None,
        in_place: Mapping[str, str] | None = None,
        single: Sequence[tuple[str, int]] = (),
        device: Any = None,
        own_memory: bool = False,
    ) -> None:
        self._device, self._own_memory = device or runtime.cpu(), own_memory
        self._machine = runtime.virtual_machine(library, self._device)
        self._main = self._machine["main"]
        self._step = self._machine[STEP] if single else self._main
        self._single = tuple(single)
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        if self._own_memory:
            weights, alive = (
                [runtime.tensor(runtime.to_numpy(w), self._device) for w in weights],
                None,
            )
        self._weights = list(weights)
        self._alive = alive
        self._in_place = dict(in_place or {})
        self._pools = set(self._in_place.values())
        self._made = [(i, p) for i, p in enumerate(outputs) if p.name not in self._in_place]
        self._small: dict[tuple[str, tuple[int, ...], str], runtime.Tensor] = {}
        self._views: dict[str, tuple[np.ndarray, runtime.Tensor]] = {}

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Run once; outputs by name.

        Raises:
            InputError: the shapes of the inputs do not fit together or with the program.
        """
        arguments = []
        for port in self.inputs:
            if port.name in self._pools:
                arguments.append(self._pool(port.name, inputs[port.name]))
                continue
            array = to_storage(np.asarray(inputs[port.name]), port.dtype)
            arguments.append(self._given(port.name, array))
        try:
            one = all(inputs[name].shape[axis] == 1 for name, axis in self._single)
            results = (self._step if one else self._main)(*arguments, *self._weights)
        except (ValueError, TypeError, RuntimeError) as error:
            shapes = ", ".join(
                f"{p.name} {tuple(a.shape)}" for p, a in zip(self.inputs, arguments, strict=True)
            )
            raise InputError(
                f"the inputs do not fit the program: {shapes}: {str(error).splitlines()[-1]}",
                "check the shapes against the signature",
            ) from error
        if self._own_memory:
            for port, argument in zip(self.inputs, arguments, strict=True):
                if port.name in self._pools:
                    np.copyto(inputs[port.name], runtime.to_numpy(argument))
        found = {name: inputs[pool] for name, pool in self._in_place.items()}
        for index, port in self._made:
            found[port.name] = from_storage(runtime.to_numpy(results[index]), port.dtype)
        return found

    def _given(self, name: str, array: np.ndarray) -> runtime.Tensor:
        """An input as a tensor. Small ones of a step are copied to where the last step's were."""
        if array.nbytes > _SMALL or not array.size:
            return runtime.tensor(array, self._device)
        key = name, array.shape, array.dtype.str
        if key not in self._small:
            self._small[key] = runtime.tensor(array, self._device)
        else:
            runtime.fill(self._small[key], array)
        return self._small[key]

    def _pool(self, name: str, pool: np.ndarray) -> runtime.Tensor:
        """A pool as the program can write it: over the same memory, or a copy on the device."""
        if self._own_memory:
            return runtime.tensor(pool, self._device)
        return self._shared(name, pool)

    def _shared(self, name: str, pool: np.ndarray) -> runtime.Tensor:
        """A pool as a tensor over the same memory, which the program writes.

        A pool stays the same array from step to step until it grows.
        """
        known = self._views.get(name)
        if known is None or known[0] is not pool:
            assert pool.ctypes.data % ALIGNMENT == 0, "a pool that is not aligned would be copied"
            flat = pool.reshape(-1).view(np.uint8)
            known = pool, shared_tensor(flat, pool.dtype.name, pool.shape)
            self._views[name] = known
        return known[1]
