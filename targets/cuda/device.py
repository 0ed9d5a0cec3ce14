"""The GPU at hand, if there is one, and TVM's runtime for it."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hal.errors import TargetError

DRIVER = "libcuda.so.1"
_CAPABILITY = (75, 76)
"""``CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR`` and ``_MINOR`` (CUDA driver API)."""
_CREATE = "ffi.Module.create.cuda"


def missing_device(arch: str = "", binary: str = "cubin") -> str:
    """Why kernels for ``arch`` cannot run here, in a phrase; empty if they can.

    Machine code runs on devices of its major architecture and the same or a later minor one
    (``sm_90a`` on none but 9.0), text on all later ones.
    """
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return f"there is no NVIDIA driver ({DRIVER})"
    if code := driver.cuInit(0):
        return f"the NVIDIA driver does not start (error {code})"
    device, count = ctypes.c_int(), ctypes.c_int()
    if driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return "there is no NVIDIA GPU"
    if driver.cuDeviceGet(ctypes.byref(device), 0):
        return "the NVIDIA GPU cannot be opened"
    found = []
    for attribute in _CAPABILITY:
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        found.append(value.value)
    if arch and not runs(arch, (found[0], found[1]), binary):
        return f"the NVIDIA GPU here is sm_{found[0]}{found[1]}, the kernels are for {arch}"
    return ""


def runs(arch: str, capability: tuple[int, int], binary: str) -> bool:
    """Whether a device of that compute capability runs kernels for ``arch``."""
    digits = arch.removeprefix("sm_").rstrip("af")
    wanted = int(digits[:-1]), int(digits[-1])
    if arch.endswith("a"):
        return wanted == capability
    if binary == "ptx":
        return wanted <= capability
    return wanted[0] == capability[0] and wanted[1] <= capability[1]


def metadata(functions: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What TVM's runtime is told about kernels: how each is called."""
    return {
        "tvm_version": "0",
        "func_info": {
            name: {
                "name": name,
                "arg_types": list(known["arguments"]),
                "launch_param_tags": list(known["launch"]),
            }
            for name, known in functions.items()
        },
    }


def open_kernels(
    path: Path, binary: str, functions: Mapping[str, Mapping[str, Any]], toolkit: Path
) -> Any:
    """A module of finished kernels, which the driver loads when the first of them is called.

    Raises:
        TargetError: TVM's runtime for the device does not load.
    """
    import json

    import tvm

    _open_runtime(toolkit)
    told = tvm.get_global_func("runtime.LoadMetaDataFromJSON")(json.dumps(metadata(functions)))
    # The driver reads text up to a zero.
    code = path.read_bytes() + (b"\0" if binary == "ptx" else b"")
    return tvm.get_global_func(_CREATE)(code, binary, told, {})


def _open_runtime(toolkit: Path) -> None:
    """Load TVM's runtime for the device; TVM does so itself only where it finds libcudart."""
    import tvm

    if tvm.get_global_func(_CREATE, allow_missing=True) is not None:
        return
    library = Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"
    try:
        for path in sorted((toolkit / "lib").glob("libcudart.so.*")):
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(library))
    except OSError as error:
        raise TargetError(
            f"TVM's runtime for CUDA does not load: {error}",
            "hal targets setup TARGET installs what it needs beside the driver",
        ) from error
