"""The passes from a lowered Relax module to an executable."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import tvm
import tvm_ffi
from tvm import relax, tirx

from hal.targets.tvm.regions import parallel_regions
from hal.targets.tvm.schedule import schedule

TRUSTED = "hal.trusted"
"""Attribute of a function: places of the parameters that no caller chooses."""

_STORES = 1
"""``MatchShapeCode::kStoreToHeap`` of TVM's virtual machine: a dim is taken from the shape."""


def pipeline(target: tvm.target.Target, lanes: int, step: str = "") -> Any:
    """Relax passes for ``tvm.compile``: legalize, fuse, schedule, plan memory.

    ``step``: a function whose kernels are too short to be started one by one.
    """

    @tvm.transform.module_pass(opt_level=0)
    def passes(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        with target:
            return tvm.transform.Sequential(
                [
                    calls_of_kernels(schedule(lanes)),
                    parallel_regions(step),
                    for_the_machine(),
                    _without_notes(),
                    _no_aliases(),
                ]
            )(module)

    return passes


def for_the_machine() -> Any:
    """The passes that plan memory and lower what is between kernels for the virtual machine."""
    return tvm.transform.Sequential(
        [
            relax.transform.StaticPlanBlockMemory(),
            relax.transform.LowerAllocTensor(),
            relax.transform.KillAfterLastUse(),
            relax.transform.LowerRuntimeBuiltin(),
            relax.transform.ComputePrimValue(),
            relax.transform.VMShapeLower(),
            _trusting(),
            relax.transform.AttachGlobalSymbol(),
        ]
    )


def _trusting() -> Any:
    """Leave out the checks of arguments that a program gives itself: weights, pools of a cache.

    They are two calls for each of hundreds of arguments, in every step. What takes a dim from a
    shape stays.
    """

    @tvm.transform.module_pass(opt_level=0)
    def trusted(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        for name, function in module.functions_items():
            if isinstance(function, relax.Function) and TRUSTED in (function.attrs or {}):
                places = {int(place) for place in function.attrs[TRUSTED]}
                own = {p for i, p in enumerate(function.params) if i in places}
                blocks = [
                    relax.BindingBlock([b for b in block.bindings if not _checks(b.value, own)])
                    for block in function.body.blocks
                ]
                body = relax.SeqExpr(blocks, function.body.body)
                module.update_func(
                    name,
                    relax.Function(
                        function.params,
                        body,
                        function.ret_ty,
                        function.is_pure,
                        function.attrs,
                    ),
                )
        return module

    return trusted


def _checks(value: Any, own: Collection[relax.Var]) -> bool:
    """Whether a call only checks one of these arguments."""
    if not isinstance(value, relax.Call) or not isinstance(value.op, relax.ExternFunc):
        return False
    name, first = str(value.op.global_symbol), value.args[0] if value.args else None
    if not isinstance(first, relax.Var) or first not in own:
        return False
    if name == "vm.builtin.match_shape":
        codes = value.args[3:-1:2]
        return all(int(code.value) != _STORES for code in codes)
    return name == "vm.builtin.check_tensor_info"


def calls_of_kernels(scheduled: Any) -> Any:
    """The passes after which a function allocates tensors and calls kernels that write them.

    ``scheduled`` is the pass that schedules the kernels.
    """
    return tvm.transform.Sequential(
        [
            relax.transform.DeadCodeElimination(),
            relax.transform.LegalizeOps(),
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
            scheduled,
            relax.transform.RewriteDataflowReshape(),
            relax.transform.ToNonDataflow(),
            relax.transform.RemovePurityChecking(),
            relax.transform.CallTIRRewrite(),
        ]
    )


def _without_notes() -> Any:
    """Drop the notes of TVM's own operators (scattering) that its code generator warns about."""

    @tvm.transform.module_pass(opt_level=0)
    def dropped(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        for name, function in module.functions_items():
            if isinstance(function, tirx.PrimFunc):
                body = tvm_ffi.structural_map(
                    function.body,
                    (tirx.AttrStmt, lambda s: s.body if s.attr_key == "pragma_scope" else s),
                    order="post",
                )
                module.update_func(name, function.with_body(body))
        return module

    return dropped


def _no_aliases() -> Any:
    """Say of every kernel that no two of its arguments overlap where one is written.

    TVM 0.27 takes what the last function of a module says for the parallel loops of all; without
    it accumulators stay in memory (linear attention: a factor of 3).
    """

    @tvm.transform.module_pass(opt_level=0)
    def marked(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        for name, function in module.functions_items():
            if isinstance(function, tirx.PrimFunc):
                module.update_func(name, function.with_attr("tirx.noalias", True))
        return module

    return marked
