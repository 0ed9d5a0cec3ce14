"""A loaded program that takes and gives NumPy arrays; TVM's small runtime is enough for it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import tvm
from tvm.runtime.vm import VirtualMachine

from hal.errors import InputError
from hal.targets.detect import usable_cores
from hal.targets.tvm.dtypes import STORED_AS, from_storage, to_storage
from hal.targets.tvm.weights import ALIGNMENT, shared_tensor

STEP = "step"
"""The function for one token of one row."""


@dataclasses.dataclass(frozen=True)
class Port:
    """An input or output of the program: its name and ONNX dtype."""

    name: str
    dtype: ir.DataType


def load_library(path: Path) -> Any:
    """Load what :func:`hal.targets.tvm.compilation.export` wrote."""
    return tvm.runtime.load_module(str(path))


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
    tvm.get_global_func("runtime.config_threadpool")(1, count or cores)


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
        weights: Sequence[tvm.runtime.Tensor],
        alive: Any = None,
        in_place: Mapping[str, str] | None = None,
        single: Sequence[tuple[str, int]] = (),
        device: Any = None,
        own_memory: bool = False,
    ) -> None:
        self._device, self._own_memory = device or tvm.cpu(), own_memory
        self._machine = VirtualMachine(library, self._device)
        self._main = self._machine["main"]
        self._step = self._machine[STEP] if single else self._main
        self._single = tuple(single)
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        if self._own_memory:
            weights, alive = [tvm.runtime.tensor(w.numpy(), self._device) for w in weights], None
        self._weights = list(weights)
        self._alive = alive
        self._in_place = dict(in_place or {})
        self._pools = set(self._in_place.values())
        self._made = [(i, p) for i, p in enumerate(outputs) if p.name not in self._in_place]
        self._views: dict[str, tuple[np.ndarray, tvm.runtime.Tensor]] = {}

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
            if array.dtype.name != STORED_AS[port.dtype]:
                array = array.astype(STORED_AS[port.dtype])
            whole = np.ascontiguousarray(array).reshape(array.shape)
            arguments.append(tvm.runtime.tensor(whole, self._device))
        try:
            one = all(inputs[name].shape[axis] == 1 for name, axis in self._single)
            results = (self._step if one else self._main)(*arguments, *self._weights)
        except (ValueError, TypeError, RuntimeError) as error:
            shapes = ", ".join(
                f"{p.name} {a.shape}" for p, a in zip(self.inputs, arguments, strict=True)
            )
            raise InputError(
                f"the inputs do not fit the program: {shapes}: {str(error).splitlines()[-1]}",
                "check the shapes against the signature",
            ) from error
        if self._own_memory:
            for port, argument in zip(self.inputs, arguments, strict=True):
                if port.name in self._pools:
                    np.copyto(inputs[port.name], argument.numpy())
        found = {name: inputs[pool] for name, pool in self._in_place.items()}
        for index, port in self._made:
            found[port.name] = from_storage(results[index].numpy(), port.dtype)
        return found

    def _pool(self, name: str, pool: np.ndarray) -> tvm.runtime.Tensor:
        """A pool as the program can write it: over the same memory, or a copy on the device."""
        if self._own_memory:
            return tvm.runtime.tensor(pool, self._device)
        return self._shared(name, pool)

    def _shared(self, name: str, pool: np.ndarray) -> tvm.runtime.Tensor:
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
