"""TVM's runtime: its library and its tensors, without the compiler and the package around them.

``import tvm`` loads a quarter of a gigabyte of compiler and a thousand modules, and torch where it
is installed, which takes a second. A program that is built needs none of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """tvm_ffi imports torch, if it is there, to take its tensors faster; programs take arrays."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]


with _without_torch():
    import tvm_ffi
    from tvm_ffi.libinfo import load_lib_ctypes

ALIGNMENT = 64
_POOLED = 2
"""The virtual machine's allocator that keeps what was freed (``AllocatorType::kPooled``)."""


def _load() -> Any:
    """TVM's runtime library, where the package has it or ``TVM_LIBRARY_PATH`` says."""
    spec = importlib.util.find_spec("tvm")
    assert spec is not None
    assert spec.origin is not None
    paths = [Path(spec.origin).parent / "lib"]
    if named := os.environ.get("TVM_LIBRARY_PATH"):
        paths.insert(0, Path(named))
    return load_lib_ctypes("tvm", "tvm_runtime", "RTLD_GLOBAL", extra_lib_paths=paths)


_LIBRARY = _load()
_allocate = tvm_ffi.get_global_func("runtime.TVMTensorAllocWithScope")
_fill = tvm_ffi.get_global_func("runtime.TVMTensorCopyFromBytes")
_read = tvm_ffi.get_global_func("runtime.TVMTensorCopyToBytes")
_view = tvm_ffi.get_global_func("runtime.TVMTensorCreateView")

Tensor = tvm_ffi.core.Tensor
Device = tvm_ffi.Device


def cpu() -> Any:
    """The processor's memory."""
    return tvm_ffi.device("cpu", 0)


def global_function(name: str) -> Any:
    """A function that TVM's runtime has under ``name``.

    Raises:
        ValueError: there is none.
    """
    return tvm_ffi.get_global_func(name)


def load_library(path: Path) -> Any:
    """Load what :func:`hal.targets.tvm.compilation.export` wrote."""
    return tvm_ffi.load_module(str(path.resolve()))


def virtual_machine(library: Any, device: Any) -> Any:
    """A Relax virtual machine on ``device``; its functions are its items."""
    machine = library["vm_load_executable"]()
    devices = dict.fromkeys([str(device), str(cpu())])  # shapes are computed on the processor
    settings: list[int] = []
    for name in devices:
        each = tvm_ffi.device(name)
        settings += [int(each.dlpack_device_type()), each.index, _POOLED]
    machine["vm_initialization"](*settings)
    return machine


def tensor(array: np.ndarray, device: Any = None) -> Any:
    """A copy of ``array`` in memory of ``device``, by default the processor's."""
    kind = tvm_ffi.dtype(array.dtype.name)
    made = _allocate(tvm_ffi.Shape(array.shape), kind, device or cpu(), None)
    fill(made, array)
    return made


def fill(tensor: Any, array: np.ndarray) -> None:
    """Copy ``array`` into a tensor of its shape and dtype."""
    array = np.ascontiguousarray(array)
    _fill(tensor, ctypes.c_void_p(array.ctypes.data), array.nbytes)


def to_numpy(value: Any) -> np.ndarray:
    """A copy of a tensor of any device."""
    name = str(value.dtype)
    kind = getattr(ml_dtypes, name) if name == "bfloat16" else name
    array = np.empty(tuple(value.shape), kind)
    _read(value, ctypes.c_void_p(array.ctypes.data), array.nbytes)
    return array


def view(array: np.ndarray, dtype: str, shape: Sequence[int]) -> Any:
    """A tensor over the memory of ``array``, which begins at a multiple of 64 bytes."""
    made = tvm_ffi.from_dlpack(array, require_alignment=ALIGNMENT, require_contiguous=True)
    if str(made.dtype) == dtype and tuple(made.shape) == tuple(shape):
        return made
    return _view(made, tvm_ffi.Shape([int(d) for d in shape]), tvm_ffi.dtype(dtype), 0)
