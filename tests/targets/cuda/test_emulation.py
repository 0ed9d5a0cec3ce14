"""The emulation of CUDA C++ on a processor: barriers, shuffles, and what it does not let pass."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tvm")

import numpy as np
import tvm

from hal.errors import UnsupportedError
from hal.targets.cuda.emulated import compile_for_host, entries
from hal.targets.cuda.pipeline import Kernel, block_threads

if not tvm.support.cc.get_cc():
    pytest.skip("there is no C++ compiler", allow_module_level=True)

HEAD = "#include <cstdint>\n#include <cuda.h>\n"


def source(body: str, parameters: str = "float* out, float* x", threads: int = 64) -> str:
    signature = f'extern "C" __global__ void __launch_bounds__({threads}) k({parameters})'
    return f"{HEAD}{signature};\n{signature} {{\n{body}\n}}\n"


def kernel(launch: tuple[str, ...] = ("blockIdx.x", "threadIdx.x")) -> Kernel:
    return Kernel("k", ("handle", "handle"), launch, 64)


def called(folder: Path, text: str, x: np.ndarray, grid: int, block: int) -> np.ndarray:
    compile_for_host(text, [kernel()], folder / "k.so")
    out = np.zeros_like(x)
    pointers = [tvm.runtime.tensor(a) for a in (out, x)]
    function = tvm.runtime.load_module(str(folder / "k.so"))["k"]
    function(*(_address(t) for t in pointers), grid, block)
    return pointers[0].numpy()


def _address(tensor: object) -> object:
    import ctypes

    return ctypes.c_void_p(np.from_dlpack(tensor).ctypes.data)  # type: ignore[call-overload]


def test_threads_meet_at_barriers_and_share_memory(tmp_path: Path) -> None:
    """Each element gets its mirror image in the block: all must have written before one reads."""
    body = (
        "__shared__ alignas(64) float s[64]; int t = (int)threadIdx.x;"
        " int i = (int)blockIdx.x * 64 + t; s[t] = x[i]; __syncthreads(); out[i] = s[63 - t];"
    )
    x = np.arange(192, dtype=np.float32)
    found = called(tmp_path, source(body), x, 3, 64)
    np.testing.assert_array_equal(found, x.reshape(3, 64)[:, ::-1].reshape(-1))


def test_without_the_barrier_the_result_is_wrong(tmp_path: Path) -> None:
    """Threads run in both directions, so a barrier that is missing shows."""
    body = (
        "__shared__ alignas(64) float s[64]; int t = (int)threadIdx.x;"
        " int i = (int)blockIdx.x * 64 + t; s[t] = x[i]; out[i] = s[63 - t];"
    )
    x = np.arange(1, 193, dtype=np.float32)
    found = called(tmp_path, source(body), x, 3, 64)
    assert (found != x.reshape(3, 64)[:, ::-1].reshape(-1)).any()


def test_a_warp_sums_by_shuffles(tmp_path: Path) -> None:
    body = (
        "int i = (int)threadIdx.x; float v = x[i];"
        " for (int d = 16; d; d /= 2) v += __shfl_down_sync(__activemask(), v, d, 32);"
        " v = __shfl_sync(~0u, v, 0, 32); out[i] = v;"
    )
    x = np.arange(64, dtype=np.float32)
    found = called(tmp_path, source(body), x, 1, 64)
    np.testing.assert_array_equal(found, np.repeat(x.reshape(2, 32).sum(1), 32))


def test_a_barrier_that_some_threads_miss_ends_the_process(tmp_path: Path) -> None:
    body = "if ((int)threadIdx.x == 0) __syncwarp(); else __syncthreads();"
    compile_for_host(source(body), [kernel()], tmp_path / "k.so")
    code = (
        "import ctypes, numpy as np, tvm\n"
        f"f = tvm.runtime.load_module({str(tmp_path / 'k.so')!r})['k']\n"
        "a = np.zeros(64, np.float32); p = ctypes.c_void_p(a.ctypes.data)\n"
        "f(p, p, 1, 64)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 70
    assert "emulated kernel k: not all threads reach" in done.stderr


def test_threads_of_a_block_are_read_from_the_source() -> None:
    assert block_threads(source("")) == {"k": 64}


def test_only_kernels_that_meet_get_stacks_of_their_own() -> None:
    assert "EMULATED(k, false, " in entries(source("out[0] = x[0];"), [kernel()])[0]
    assert "EMULATED(k, true, " in entries(source("__syncthreads();"), [kernel()])[0]


def test_what_is_not_emulated_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="use_dyn_shared_memory"):
        entries(source(""), [kernel(("blockIdx.x", "tirx.use_dyn_shared_memory"))])


def test_a_source_that_does_not_compile_is_told_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=re.escape("cannot be emulated")) as caught:
        compile_for_host(source("unknown();"), [kernel()], tmp_path / "k.so")
    assert "\n" not in caught.value.message
    assert not list(tmp_path.glob("*.cu"))
