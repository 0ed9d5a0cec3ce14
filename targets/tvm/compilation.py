"""From a Relax module to machine code in a shared library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tvm

from hal.errors import TargetError, UnsupportedError
from hal.targets.tvm.pipeline import pipeline
from hal.targets.tvm.program import STEP

DEFAULT_TARGET = {"kind": "llvm"}


def compile_module(module: tvm.IRModule, target: Mapping[str, Any], lanes: int) -> Any:
    """Compile for a TVM target given as its JSON dictionary; ``lanes`` float32 make a vector.

    Raises:
        UnsupportedError: code generation failed.
    """
    chosen = tvm.target.Target(dict(target))
    try:
        return tvm.compile(module, target=chosen, relax_pipeline=pipeline(chosen, lanes, STEP))
    except Exception as error:  # TVM raises its own kinds
        lines = str(error).strip().splitlines()
        raise UnsupportedError(
            f"TVM could not compile the graph: {lines[-1] if lines else repr(error)}",
            "report this; meanwhile use another route",
        ) from error


def export(library: Any, path: Path, cross_compiler: str | None = None) -> None:
    """Write the compiled module as a shared library.

    Raises:
        TargetError: there is no C compiler to link with, or it fails.
    """
    options = {}
    if cross_compiler:
        options["fcompile"] = tvm.support.cc.cross_compiler(cross_compiler)
    elif not tvm.support.cc.get_cc():
        raise TargetError(
            "no C compiler was found, and TVM links its libraries with one",
            "install gcc or clang, or set CXX to one",
        )
    try:
        library.export_library(str(path), **options)
    except RuntimeError as error:  # what the linker said
        raise TargetError(
            f"linking {path.name} failed: {(str(error).strip().splitlines() or ['?'])[-1]}",
            "check the C compiler and the free disk space",
        ) from error
