"""Kernels' source compiled for the processor at hand, to check them where there is no GPU."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import tvm

from hal.errors import TargetError, UnsupportedError
from hal.targets.cuda.pipeline import Kernel

HEADERS = Path(__file__).with_name("emulation")
_AXES = {"blockIdx": "grid_extent", "threadIdx": "block_extent"}
_HEAD = re.compile(r'^extern "C" __global__ void .*?\) \{$', re.MULTILINE)


def compile_for_host(source: str, kernels: Sequence[Kernel], path: Path) -> None:
    """Write a library whose functions are called as those of a module of CUDA kernels.

    Raises:
        TargetError: there is no compiler.
        UnsupportedError: it refuses the source.
    """
    compiler = tvm.support.cc.get_cc()
    if not compiler:
        raise TargetError("no C++ compiler was found", "install g++ or clang, or set CXX to one")
    file = path.with_suffix(".cu")
    file.write_text(source + "\n" + "\n".join(entries(source, kernels)) + "\n")
    command = [
        compiler, "-x", "c++", "-std=c++17", "-O2", "-fPIC", "-shared", "-fno-strict-aliasing",
        f"-I{HEADERS}", str(file), "-lstdc++", "-lm", "-o", str(path),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    file.unlink()
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line]
        told = (lines or done.stderr.strip().splitlines() or [str(done.returncode)])[0]
        raise UnsupportedError(
            f"the kernels cannot be emulated: {told}", "build for the device's own route"
        )


def entries(source: str, kernels: Sequence[Kernel]) -> list[str]:
    """A line for each kernel that makes it callable.

    Raises:
        UnsupportedError: it is launched in a way that is not emulated.
    """
    lines = []
    for kernel in kernels:
        extents = []
        for tag in kernel.launch:
            place, _, axis = tag.partition(".")
            if place not in _AXES:
                raise UnsupportedError(
                    f"kernel {kernel.name!r} is launched with {tag!r}, which is not emulated",
                    "build for the device's own route",
                )
            extents.append(f", &emulated::{_AXES[place]}.{axis}")
        meets = any(word in _body(source, kernel.name) for word in ("__sync", "__shfl"))
        lines.append(f"EMULATED({kernel.name}, {str(meets).lower()}{''.join(extents)})")
    return lines


def _body(source: str, name: str) -> str:
    """The text of a kernel's definition."""
    heads = list(_HEAD.finditer(source))
    for index, head in enumerate(heads):
        if f" {name}(" in head.group():
            end = heads[index + 1].start() if index + 1 < len(heads) else len(source)
            return source[head.end() : end]
    raise AssertionError(f"no kernel {name!r} in the source")
