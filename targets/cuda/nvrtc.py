"""NVIDIA's run-time compiler as a compiler ahead of time: it needs neither a GPU nor a driver."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

from hal.errors import TargetError, UnsupportedError


def compile_source(source: str, arch: str, folder: Path, *, ptx: bool = False) -> bytes:
    """A cubin for ``arch`` (``sm_90``), or with ``ptx`` text that a driver compiles when it loads.

    ``folder`` holds the toolkit's ``lib`` and ``include``. Arithmetic is as it is written, but that
    a product and a sum may become one operation.

    Raises:
        TargetError: the compiler is not in the folder, or does not load.
        UnsupportedError: it refuses the source; the text has its first complaint.
    """
    library = _library(folder / "lib")
    program = ctypes.c_void_p()
    _done(
        library,
        library.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None
        ),
    )
    try:
        name = arch.replace("sm_", "compute_") if ptx else arch
        options = [f"--gpu-architecture={name}", "--std=c++17", f"-I{folder / 'include'}"]
        options.append(f"-I{folder / 'include' / 'cccl'}")
        words = [option.encode() for option in options]
        given = (ctypes.c_char_p * len(words))(*words)
        if library.nvrtcCompileProgram(program, len(words), given):
            raise UnsupportedError(
                f"the compiler for {arch} refuses the kernels: {_complaint(library, program)}",
                "report this; meanwhile use another route",
            )
        return _taken(library, program, "PTX" if ptx else "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _library(folder: Path) -> ctypes.CDLL:
    try:
        # It opens its second half by name when it compiles, which finds what is loaded already.
        found = [next(folder.glob(f"{n}.so.*")) for n in ("libnvrtc-builtins", "libnvrtc")]
        return [ctypes.CDLL(str(path)) for path in found][-1]
    except StopIteration:
        raise TargetError(f"there is no libnvrtc in {folder}", "set the target up again") from None
    except OSError as error:
        raise TargetError(f"libnvrtc does not load: {error}", "set the target up again") from error


def _complaint(library: ctypes.CDLL, program: ctypes.c_void_p) -> str:
    text = _taken(library, program, "ProgramLog").decode(errors="replace").strip("\0")
    lines: Sequence[str] = [line for line in text.splitlines() if "error" in line]
    return (lines or text.splitlines() or ["no message"])[0].strip()


def _taken(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _done(library, getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    data = ctypes.create_string_buffer(size.value)
    _done(library, getattr(library, f"nvrtcGet{what}")(program, data))
    return data.raw


def _done(library: ctypes.CDLL, code: int) -> None:
    if code:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        text = library.nvrtcGetErrorString(code).decode()
        raise TargetError(f"libnvrtc failed: {text}", "set the target up again")
