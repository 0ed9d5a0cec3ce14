"""From a lowered module to host code and the source of kernels, each shaped for a GPU."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.s_tir import dlight

from hal.errors import UnsupportedError
from hal.targets.tvm.pipeline import calls_of_kernels, for_the_machine

CPU = 1
"""DLPack's number of the kind of device whose memory is the host's."""

_LAUNCH = "tirx.kernel_launch_params"
_BUILD = "target.build.cuda"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """How a kernel is called: dtypes of its arguments, then what the numbers after them mean."""

    name: str
    arguments: tuple[str, ...]
    launch: tuple[str, ...]
    threads: int
    """Threads of a block."""


@dataclasses.dataclass(frozen=True)
class Generated:
    """``host`` is an executable without its kernels, ``source`` is theirs in CUDA C++."""

    host: Any
    source: str
    kernels: tuple[Kernel, ...]


def generate(module: tvm.IRModule, target: Mapping[str, Any], *, emulated: bool) -> Generated:
    """Schedule every kernel by rules for GPUs and generate code.

    With ``emulated`` the host code passes memory of the host to the kernels, which are the same.

    Raises:
        UnsupportedError: a kernel is not scheduled by any rule.
    """
    table = {"host": {"kind": "llvm"}, **target}
    if emulated:
        table["target_device_type"] = CPU
    chosen = tvm.target.Target(table)
    signatures: dict[str, Any] = {}
    sources: list[str] = []
    original = tvm.get_global_func(_BUILD)

    def build(kernels: tvm.IRModule, for_target: Any) -> Any:
        for _, function in kernels.functions_items():
            signatures[str(function.attrs["global_symbol"])] = function
        made = original(kernels, for_target)
        sources.append(made.inspect_source("cuda"))
        return made

    tvm_ffi.register_global_func(_BUILD, build, override=True)
    try:
        host = tvm.compile(module, target=chosen, relax_pipeline=_pipeline(chosen))
    finally:
        tvm_ffi.register_global_func(_BUILD, original, override=True)
    if len(sources) > 1:
        raise UnsupportedError("the kernels are for several GPUs", "report this")
    for imported in host.mod.imports:
        imported.clear_imports()
    source = sources[0] if sources else ""
    threads = block_threads(source)
    kernels = [
        Kernel(
            name,
            tuple(_argument(p) for p in function.params),
            tuple(map(str, function.attrs[_LAUNCH])),
            threads[name],
        )
        for name, function in signatures.items()
    ]
    return Generated(host, source, tuple(kernels))


def block_threads(source: str) -> dict[str, int]:
    """Threads of a block by kernel, as the source of kernels declares them."""
    found = re.findall(r"__launch_bounds__\((\d+)\)\s+(\w+)\(", source)
    return {name: int(count) for count, name in found}


def _pipeline(target: tvm.target.Target) -> Any:
    """Relax passes, with the default rules for GPUs as the schedule."""

    @tvm.transform.module_pass(opt_level=0)
    def passes(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        with target:
            return for_the_machine()(calls_of_kernels(_scheduled(target))(module))

    return passes


def _scheduled(target: tvm.target.Target) -> Any:
    """A pass that gives every kernel the schedule of the first rule that applies to it."""
    gpu = dlight.gpu
    rules = (gpu.Matmul(), gpu.GEMV(), gpu.Reduction(), gpu.GeneralReduction(), gpu.Fallback())

    @tvm.transform.module_pass(opt_level=0)
    def schedule(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        kernels = [(n, f) for n, f in module.functions_items() if isinstance(f, tirx.PrimFunc)]
        for name, function in kernels:
            found = next((s for r in rules if (s := _applied(r, function, target))), None)
            if found is None:
                raise UnsupportedError(
                    f"no rule shapes the kernel {name.name_hint!r} for a GPU",
                    "report this; meanwhile use another route",
                )
            module.update_func(name, found.with_attr("tirx.is_scheduled", True))
        return module

    return schedule


def _applied(rule: Any, function: tirx.PrimFunc, target: tvm.target.Target) -> Any:
    """A kernel as the rule schedules it, or None: TVM's rules stumble over what is not for them."""
    try:
        plan = rule.apply(function, target, False)
    except Exception:  # noqa: BLE001 - a schedule that does not apply raises many kinds
        return None
    if isinstance(plan, list):
        plan = plan[0] if plan else None
    return None if plan is None else plan.mod["main"]


def _argument(parameter: Any) -> str:
    kind = str(parameter.ty.dtype) if hasattr(parameter.ty, "dtype") else "handle"
    return kind if re.fullmatch(r"(u?int|float|bool)\d*", kind) else "handle"
