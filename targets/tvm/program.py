"""From a Relax module to machine code, and a loaded program that takes and gives NumPy arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax

from hal.targets.tvm.dtypes import STORED_AS, from_storage, to_storage
from hal.targets.tvm.lower import Port

DEFAULT_TARGET = {"kind": "llvm", "opt-level": 2}


def compile_module(module: tvm.IRModule, target: Mapping[str, Any]) -> Any:
    """Compile for a TVM target given as its JSON dictionary."""
    return tvm.compile(module, target=tvm.target.Target(dict(target)))


def as_tensor(array: np.ndarray) -> tvm.runtime.Tensor:
    """A TVM tensor over the array's memory where alignment allows, a copy otherwise.

    The caller keeps ``array`` alive for as long as the tensor is used.
    """
    if array.flags.c_contiguous and array.flags.writeable and array.ctypes.data % 64 == 0 and array.size:
        try:
            return tvm.runtime.from_dlpack(array)
        except (TypeError, ValueError, BufferError, RuntimeError):
            pass
    return tvm.runtime.tensor(np.ascontiguousarray(array).reshape(array.shape))


class Program:
    """``main`` of a Relax virtual machine with its weights."""

    def __init__(
        self,
        library: Any,
        inputs: Sequence[Port],
        outputs: Sequence[Port],
        weights: Sequence[tvm.runtime.Tensor],
    ) -> None:
        self._machine = relax.VirtualMachine(library, tvm.cpu())
        self._main = self._machine["main"]
        self._inputs = tuple(inputs)
        self._outputs = tuple(outputs)
        self._weights = list(weights)

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Run once; outputs by name."""
        arguments = []
        for port in self._inputs:
            array = to_storage(np.asarray(inputs[port.name]), port.dtype)
            if array.dtype.name != STORED_AS[port.dtype]:
                array = array.astype(STORED_AS[port.dtype])
            arguments.append(tvm.runtime.tensor(np.ascontiguousarray(array).reshape(array.shape)))
        results = self._main(*arguments, *self._weights)
        return {
            port.name: from_storage(result.numpy(), port.dtype)
            for port, result in zip(self._outputs, results, strict=True)
        }
