"""What TVM does for a program: a module of static calls, and an object of kernels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tvm
from tvm import tirx

from hal.errors import UnsupportedError
from hal.targets.aot.plan import Plan
from hal.targets.tvm.pipeline import calls_of_kernels
from hal.targets.tvm.schedule import schedule


def planned_module(module: tvm.IRModule, target: Mapping[str, Any], lanes: int) -> tvm.IRModule:
    """The lowered module with kernels that are scheduled, and results that are allocated.

    Raises:
        UnsupportedError: TVM fails.
    """
    chosen = tvm.target.Target(dict(target))
    try:
        with chosen:
            return calls_of_kernels(schedule(lanes))(module)
    except Exception as error:  # TVM raises its own kinds
        raise _failed(error) from error


def kernel_object(module: tvm.IRModule, plan: Plan, target: Mapping[str, Any], path: Path) -> None:
    """Compile the kernels that a plan calls to an object file.

    Raises:
        UnsupportedError: code generation failed.
    """
    called = {call.kernel for call in plan.calls}
    kernels = {
        name.name_hint: function.with_attr("global_symbol", name.name_hint)
        for name, function in module.functions_items()
        if isinstance(function, tirx.PrimFunc) and name.name_hint in called
    }
    try:
        built = tvm.compile(tvm.IRModule(kernels), target=tvm.target.Target(dict(target)))
        built.mod.write_to_file(str(path), "o")
    except Exception as error:  # TVM raises its own kinds
        raise _failed(error) from error


def _failed(error: Exception) -> UnsupportedError:
    lines = str(error).strip().splitlines()
    return UnsupportedError(
        f"TVM could not compile the graph: {lines[-1] if lines else repr(error)}",
        "report this; meanwhile use another route",
    )
