"""What finished kernels need of a GPU, as the toolkit reads it from them."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hal.errors import TargetError, UnsupportedError
from hal.targets.cuda.pipeline import Kernel

_FUNCTION = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_RESERVED = 1024
"""Bytes of shared memory that the system keeps for itself in a block, counted since sm_90
(CUDA Programming Guide, compute capability 8.x: 1 KB of each block is reserved)."""


@dataclasses.dataclass(frozen=True)
class Usage:
    """Registers of a thread; bytes of shared memory of a block and of stack of a thread."""

    registers: int
    stack: int
    shared: int


def usage_of(cubin: Path, toolkit: Path) -> dict[str, Usage]:
    """Kernels in a cubin with what they need, as ``cuobjdump`` says.

    Raises:
        TargetError: it does not run, or cannot read the file.
    """
    command = [str(toolkit / "bin" / "cuobjdump"), "--dump-resource-usage", str(cubin)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise TargetError(f"cuobjdump cannot run: {error}", "set the target up again") from error
    if done.returncode:
        told = (done.stderr.strip().splitlines() or [str(done.returncode)])[-1]
        raise TargetError(f"cuobjdump cannot read the kernels: {told}", "report this")
    return {
        name: Usage(int(registers), int(stack), int(shared))
        for name, registers, stack, shared in _FUNCTION.findall(done.stdout)
    }


def require_fit(
    kernels: Sequence[Kernel], usage: Mapping[str, Usage], target: Mapping[str, Any]
) -> None:
    """Compare the kernels that are called with those that were made, and with the chip's limits.

    Raises:
        UnsupportedError: one is missing, is not called, or needs more than a block may have.
    """
    called = {kernel.name for kernel in kernels}
    if wrong := sorted(called ^ set(usage)):
        raise UnsupportedError(
            f"kernels that are called and kernels that were made differ: {', '.join(wrong)}",
            "report this",
        )
    threads, shared = target["max_threads_per_block"], target["max_shared_memory_per_block"]
    for kernel in kernels:
        needs = usage[kernel.name]
        if kernel.threads > threads or needs.shared > shared + _RESERVED:
            raise UnsupportedError(
                f"kernel {kernel.name!r} needs {kernel.threads} threads and {needs.shared} bytes "
                f"of shared memory in a block; {target['arch']} has {threads} and {shared}",
                "report this; meanwhile use another route",
            )
