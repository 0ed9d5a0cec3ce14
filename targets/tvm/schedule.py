"""Loops to cores and vectors: a default schedule for kernels that have none of their own.

For each block the outer data-parallel loops are fused and run in parallel; the innermost one is
vectorized where its extent is a known multiple of the vector length, with the reduction moved
outside of it. Kernels written by hand (attribute ``tirx.is_scheduled``) stay as they are.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import s_tir, tirx

_DATA_PARALLEL = 0
_REDUCTION = 2
_SMALLEST_PARALLEL = 16384
"""Iterations below which starting threads costs more than it saves."""


def schedule(lanes: int) -> Any:
    """A module pass that schedules every primitive function."""

    @tvm.transform.module_pass(opt_level=0)
    def scheduled(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        updates = {}
        for name, function in module.functions_items():
            if not isinstance(function, tirx.PrimFunc) or _is_done(function):
                continue
            result = _schedule_function(function, lanes)
            if result is not None:
                updates[name] = result
        for name, function in updates.items():
            module.update_func(name, function)
        return module

    return scheduled


def _is_done(function: tirx.PrimFunc) -> bool:
    attrs = function.attrs
    return attrs is not None and "tirx.is_scheduled" in attrs


def _schedule_function(function: tirx.PrimFunc, lanes: int) -> tirx.PrimFunc | None:
    """The scheduled function, or None where a transformation does not apply."""
    try:
        plan = s_tir.Schedule(function, debug_mask="none", error_render_level="none")
        _inline_booleans(plan)
        for block in plan.get_child_blocks(plan.get_sblock("root")):
            _schedule_block(plan, block, lanes)
        return plan.mod["main"].with_attr("tirx.is_scheduled", True)
    except Exception:  # noqa: BLE001 - a schedule that does not apply raises many kinds
        return None


def _inline_booleans(plan: Any) -> None:
    """Compute conditions where they are used: TVM 0.27 generates no code for vectors of them."""
    root = plan.get_sblock("root")
    inner = list(plan.get(root).alloc_buffers)
    for block in plan.get_child_blocks(root):
        written = plan.get(block).writes[0].buffer
        if str(written.dtype) == "bool" and any(written.same_as(b) for b in inner):
            plan.compute_inline(block)


def _schedule_block(plan: Any, block: Any, lanes: int) -> None:
    loops = plan.get_loops(block)
    kinds = [int(v.iter_type) for v in plan.get(block).iter_vars]
    if len(kinds) != len(loops) or any(k not in (_DATA_PARALLEL, _REDUCTION) for k in kinds):
        return
    spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == _DATA_PARALLEL]
    reduction = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == _REDUCTION]
    work = _static_product([plan.get(loop).extent for loop in loops])
    inner = None
    if spatial:
        extent = _static(plan.get(spatial[-1]).extent)
        if extent is not None and extent % lanes == 0:
            outer, inner = plan.split(spatial[-1], [None, lanes])
            spatial[-1] = outer
    if inner is not None and reduction:
        plan.reorder(*spatial, *reduction, inner)
    if spatial and (work is None or work >= _SMALLEST_PARALLEL):
        fused = plan.fuse(*spatial) if len(spatial) > 1 else spatial[0]
        plan.parallel(fused)
    if inner is None:
        return
    plan.vectorize(inner)
    if reduction:
        plan.decompose_reduction(block, reduction[0])


def _static(extent: Any) -> int | None:
    return int(extent.value) if isinstance(extent, tirx.IntImm) else None


def _static_product(extents: list[Any]) -> int | None:
    result = 1
    for extent in extents:
        value = _static(extent)
        if value is None:
            return None
        result *= value
    return result
