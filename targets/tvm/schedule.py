"""Loops to cores and vectors: a default schedule for kernels that have none of their own.

For each block the outer data-parallel loops are fused and run in parallel; the innermost one is
vectorized where its extent is a known multiple of the vector length, with the reduction moved
outside of it. Kernels written by hand (attribute ``tirx.is_scheduled``) stay as they are.
"""

from __future__ import annotations

import contextlib
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.ir.expr import TensorLoad

_DATA_PARALLEL = 0
_REDUCTION = 2
_SMALLEST_PARALLEL = 16384
"""Iterations below which starting threads costs more than it saves."""
_MANY_TASKS = 64
"""Iterations of a parallel loop that are enough to share out evenly."""


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
        _inline(plan)
        for block in plan.get_child_blocks(plan.get_sblock("root")):
            _schedule_block(plan, block, lanes)
        return plan.mod["main"].with_attr("tirx.is_scheduled", True)
    except RuntimeError:  # of TVM: it does not apply; what is wrong here is not of that kind
        return None


def _inline(plan: Any) -> None:
    """Compute where it is used what costs nothing (copies) and what must not stand alone.

    TVM 0.27 generates no code for vectors of conditions.
    """
    root = plan.get_sblock("root")
    inner = list(plan.get(root).alloc_buffers)
    for block in plan.get_child_blocks(root):
        written = plan.get(block).writes[0].source
        if not any(written.same_as(b) for b in inner):
            if _is_copy(plan.get(block)) and len(plan.get_producers(block)) == 1:
                with contextlib.suppress(RuntimeError):  # it moves more than places
                    plan.reverse_compute_inline(block)
            continue
        if str(written.dtype) == "bool" or _is_copy(plan.get(block)):
            plan.compute_inline(block)


def _is_copy(block: Any) -> bool:
    """Whether each element is one of another tensor."""
    body = block.body
    return isinstance(body, tirx.BufferStore) and isinstance(body.value, TensorLoad)


def _schedule_block(plan: Any, block: Any, lanes: int) -> None:
    loops = plan.get_loops(block)
    kinds = [int(v.iter_type) for v in plan.get(block).iter_vars]
    if len(kinds) != len(loops) or any(k not in (_DATA_PARALLEL, _REDUCTION) for k in kinds):
        return
    spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == _DATA_PARALLEL]
    reduction = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == _REDUCTION]
    work = _static_product([plan.get(loop).extent for loop in loops])
    if spatial and reduction and _adds_neighbours(plan.get(block), loops.index(reduction[-1])):
        extent = _static(plan.get(reduction[-1]).extent)
        if extent is not None and extent % lanes == 0 and extent > lanes > 1:
            _schedule_sum(plan, block, (spatial, reduction), lanes, work)
            return
    inner = row = None
    if spatial:
        extent = _static(plan.get(spatial[-1]).extent)
        if extent is not None and extent % lanes == 0:
            outer, inner = plan.split(spatial[-1], [None, lanes])
            spatial[-1] = outer
            if _feeds_cores(plan, spatial[:-1]):
                row = spatial.pop()  # finding a place by its number costs divisions
    if inner is not None and reduction:
        plan.reorder(*spatial, *([row] if row else []), *reduction, inner)
    _parallelize(plan, spatial, work)
    if inner is None:
        return
    plan.vectorize(inner)
    if reduction:
        plan.decompose_reduction(block, reduction[0])


def _feeds_cores(plan: Any, loops: list[Any]) -> bool:
    """Whether loops alone have tasks for all cores: many, or as many as only the run tells."""
    count = _static_product([plan.get(loop).extent for loop in loops])
    return bool(loops) and (count is None or count >= _MANY_TASKS)


def _parallelize(plan: Any, spatial: list[Any], work: int | None) -> None:
    if spatial and (work is None or work >= _SMALLEST_PARALLEL):
        plan.parallel(plan.fuse(*spatial) if len(spatial) > 1 else spatial[0])


def _adds_neighbours(block: Any, place: int) -> bool:
    """Whether the iteration at ``place`` goes from neighbour to neighbour in what it indexes."""
    variable = block.iter_vars[place].var
    if len(block.writes) > 1:
        return False
    for read in block.reads:
        *outer, last = (r.min for r in read.region)
        if any(_has(index, variable) for index in outer):
            return False
        if _has(last, variable) and not last.same_as(variable):
            return False
    return True


def _has(index: Any, variable: tirx.Var) -> bool:
    return any(v.same_as(variable) for v in tirx.analysis.undefined_vars(index))


def _schedule_sum(
    plan: Any, block: Any, nest: tuple[list[Any], list[Any]], lanes: int, work: int | None
) -> None:
    """A sum along neighbours becomes one in each lane of a vector, and the sum of these."""
    spatial, reduction = nest
    _, lane = plan.split(reduction[-1], [None, lanes])
    parts = plan.rfactor(lane, len(spatial))
    for each in (parts, block):
        loops = plan.get_loops(each)
        outer, inner = loops[: len(spatial)], loops[len(spatial) :]
        _parallelize(plan, outer, work)
        if each is parts:
            plan.vectorize(inner[-1])
        plan.decompose_reduction(each, inner[0])


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
