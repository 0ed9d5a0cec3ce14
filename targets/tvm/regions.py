"""Kernels that follow each other become one parallel region, with barriers between them.

A decode step is hundreds of kernels of microseconds each. Called one by one, each costs a call of
the virtual machine, and each parallel one the start of all threads; in a region the threads are
started once, and wait for each other where one kernel ends. What is not parallel runs on the first
thread. A model's layers are alike, so regions are cut where kernels repeat, and the code of one
region serves all layers.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import tvm
import tvm_ffi
from tvm import relax, s_tir, tirx
from tvm.sym.analyzer import Analyzer

_PARALLEL = int(tirx.ForKind.PARALLEL)
_LONGEST = 64
"""Kernels in a region: compiling time grows faster than their number."""


_ALLOCATION = "relax.builtin.alloc_tensor"


class _Refused(Exception):  # noqa: N818 - it is no error
    """A kernel that cannot be part of a region."""


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """Memory that a kernel gets: what holds it, with that one's shape, and the shape it is seen in.

    Dims are numbers or symbols of the Relax function.
    """

    holder: relax.Expr
    whole: tuple[Any, ...]
    shape: tuple[Any, ...]
    dtype: str

    def seen_as(self, shape: Sequence[Any]) -> _Tensor:
        return dataclasses.replace(self, shape=tuple(shape))


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of a kernel whose results are among its arguments."""

    binding: relax.VarBinding
    kernel: tvm.ir.GlobalVar
    arguments: tuple[_Tensor, ...]


def parallel_regions(function: str) -> Any:
    """A module pass for one Relax function, behind ``CallTIRRewrite``."""

    @tvm.transform.module_pass(opt_level=0)
    def merged(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        names = {v.name_hint: v for v, _ in module.functions_items()}
        if function not in names:
            return module
        return _Merging(module, names[function]).run()

    return merged


class _Merging:
    """The pass on one module."""

    def __init__(self, module: tvm.IRModule, name: tvm.ir.GlobalVar) -> None:
        self._module, self._name = module, name
        self._builder = relax.BlockBuilder(module)
        self._tensors: dict[relax.Var, _Tensor] = {}
        self._tuples: dict[relax.Var, relax.Tuple] = {}
        self._made: dict[tvm.ir.GlobalVar, tirx.PrimFunc] = {}
        self._kernels: dict[tvm.ir.GlobalVar, tirx.PrimFunc | None] = {}
        self._allocated: set[relax.Var] = set()

    def run(self) -> tvm.IRModule:
        old = self._module[self._name]
        if len(old.body.blocks) != 1:
            return self._module
        items = self._items(old.body.blocks[0].bindings)
        bindings = self._emitted(items, old.body.body)
        body = relax.SeqExpr([relax.BindingBlock(bindings)], old.body.body)
        new = relax.Function(old.params, body, old.ret_ty, old.is_pure, old.attrs)
        module = self._builder.get()
        module.update_func(module.get_global_var(self._name.name_hint), new)
        return module

    def _items(self, bindings: Sequence[relax.Binding]) -> list[relax.Binding | tuple[_Call, ...]]:
        """Bindings in an order in which calls that can be one region are together, in a tuple."""
        calls = {b: call for b in bindings if (call := self._understood(b)) is not None}
        cut = _where_to_cut([call.kernel.name_hint for call in calls.values()])
        result: list[relax.Binding | tuple[_Call, ...]] = []
        pending: list[_Call] = []
        views: list[relax.Binding] = []

        def flush() -> None:
            if len(pending) == 1:
                result.append(pending[0].binding)
            elif pending:
                result.append(tuple(pending))
            result.extend(views)
            pending.clear()
            views.clear()

        for binding in bindings:
            call = calls.get(binding)
            if call is not None:
                if call.kernel.name_hint == cut or len(pending) >= _LONGEST:
                    flush()
                pending.append(call)
            elif _is_op(binding, _ALLOCATION):
                result.append(binding)
            elif self._is_view(binding) and pending:
                views.append(binding)
            else:
                if not self._is_view(binding):
                    flush()
                result.append(binding)
        flush()
        return result

    def _is_view(self, binding: relax.Binding) -> bool:
        return binding.var in self._tensors or binding.var in self._tuples

    def _emitted(
        self, items: Sequence[relax.Binding | tuple[_Call, ...]], result: relax.Expr
    ) -> list[relax.Binding]:
        """Bindings but views that nobody needs, and memory that one region alone uses."""
        used_by: dict[relax.Expr, list[int]] = {v: [-1] for v in relax.analysis.free_vars(result)}
        kept: list[int] = []
        for index in reversed(range(len(items))):
            item = items[index]
            if isinstance(item, tuple):
                used = {tensor.holder for call in item for tensor in call.arguments}
            elif self._is_view(item) and item.var not in used_by:
                continue
            else:
                used = set(relax.analysis.free_vars(item.value))
            kept.append(index)
            for expr in used:
                used_by.setdefault(expr, []).append(index)
        own = {i: self._own(i, items[i], used_by) for i in kept if isinstance(items[i], tuple)}
        inside = {holder for holders in own.values() for holder in holders}
        emitted: list[relax.Binding] = []
        for index in reversed(kept):
            item = items[index]
            if isinstance(item, tuple):
                emitted += self._region(item, own[index])
            elif item.var not in inside:
                emitted.append(item)
        return emitted

    def _own(
        self, index: int, calls: Sequence[_Call], used_by: dict[relax.Expr, list[int]]
    ) -> set[relax.Expr]:
        """Allocated tensors that only one region uses: one of its kernels writes, another reads.

        What a single kernel has may never be touched, and then is no memory at all for TVM.
        """
        times = Counter(h for call in calls for h in {t.holder for t in call.arguments})
        return {
            holder
            for holder, count in times.items()
            if count > 1 and holder in self._allocated and used_by[holder] == [index]
        }

    # -- what the bindings mean -------------------------------------------------------------------

    def _understood(self, binding: relax.Binding) -> _Call | None:
        """The call that a binding is, if it can be part of a region; views are remembered."""
        value = getattr(binding, "value", None)
        if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.GlobalVar):
            arguments = [self._tensor(a) for a in value.args]
            known = tuple(a for a in arguments if a is not None)
            call = _Call(binding, value.op, known)
            return call if len(known) == len(arguments) and self._fits(call) else None
        if _is_op(binding, _ALLOCATION):
            self._allocated.add(binding.var)
        elif isinstance(value, relax.Call) and _is_op(binding, "relax.reshape"):
            source, shape = self._tensor(value.args[0]), _dims(binding.var)
            if source is not None and shape is not None:
                self._tensors[binding.var] = source.seen_as(shape)
        elif isinstance(value, relax.Var):
            source = self._tensor(value)
            if source is not None:
                self._tensors[binding.var] = source
        elif isinstance(value, relax.Tuple):
            self._tuples[binding.var] = value
        elif isinstance(value, relax.TupleGetItem) and value.tuple_value in self._tuples:
            source = self._tensor(self._tuples[value.tuple_value].fields[value.index])
            if source is not None:
                self._tensors[binding.var] = source
        return None

    def _tensor(self, expr: relax.Expr) -> _Tensor | None:
        if isinstance(expr, relax.Var) and expr in self._tensors:
            return self._tensors[expr]
        shape = _dims(expr)
        if shape is None or not isinstance(expr, (relax.Var, tvm.ir.GenericConst)):
            return None
        return _Tensor(expr, shape, shape, str(expr.ty.dtype))

    def _fits(self, call: _Call) -> bool:
        if call.kernel not in self._kernels:
            self._kernels[call.kernel] = self._prepared(call)
        return self._kernels[call.kernel] is not None

    def _prepared(self, call: _Call) -> tirx.PrimFunc | None:
        """A kernel as regions take it; None if it cannot be part of one."""
        function = self._module[call.kernel]
        if not isinstance(function, tirx.PrimFunc) or len(function.params) != len(call.arguments):
            return None
        try:
            flat = _flattened(function)
            _Region().add(flat, call.arguments)
        except _Refused:
            return None
        return flat

    # -- regions ----------------------------------------------------------------------------------

    def _region(self, calls: Sequence[_Call], own: set[relax.Expr]) -> list[relax.Binding]:
        region = _Region()
        for call in calls:
            region.add(self._kernels[call.kernel], call.arguments)
        function = region.finished(own)
        name = next((n for n, made in self._made.items() if _same(made, function)), None)
        if name is None:
            name = self._builder.add_func(function, "region")
            self._made[name] = function
        given = [holder for holder in region.holders if holder not in own]
        nothing = relax.Var("_", relax.TupleType([]))
        return [relax.VarBinding(nothing, relax.Call(name, given))]


def _where_to_cut(kernels: Sequence[str]) -> str | None:
    """The kernel before each call of which a region ends.

    Of those that are called as often as most others are, which is once for each layer, the first.
    """
    counts = Counter(kernels)
    often = Counter(count for count in counts.values() if count > 1)
    if not often:
        return None
    usual = max(often, key=lambda count: (often[count], -count))
    return next(name for name in kernels if counts[name] == usual)


class _Region:
    """The function of a region, as it grows.

    All that happens to a tensor goes through one buffer. TVM 0.27 takes two views of the same
    memory for memory that has nothing to do with each other: it lets the instructions for one pass
    those for the other, and gives the memory away once no view is declared any more.
    """

    def __init__(self) -> None:
        self.holders: dict[relax.Expr, Any] = {}
        """What is passed, and the parameters for it."""
        self._flat: dict[relax.Expr, Any] = {}
        self._dims: dict[str, tirx.Var] = {}
        self._stages: list[tirx.Stmt] = []
        self._serial: list[tirx.Stmt] = []

    def add(self, kernel: tirx.PrimFunc, arguments: Sequence[_Tensor]) -> None:
        """Append a kernel of :func:`_flattened`.

        Raises:
            _Refused: it cannot be split into stages.
        """
        fresh = s_tir.renew_defs(kernel)
        known: dict[tirx.Var, tirx.Var] = {}
        flat, body = _without_views(fresh)
        for parameter, tensor in zip(fresh.params, arguments, strict=True):
            for old, new in zip(parameter.ty.shape, tensor.shape, strict=True):
                if isinstance(old, tirx.Var):
                    known[old] = self._dim(new)
            if parameter in flat:
                known[flat[parameter]] = self._holder(tensor, str(flat[parameter].ty.dtype))
        body = tvm_ffi.structural_map(body, (tirx.Var, lambda v: known.get(v, v)), order="post")
        for stage, is_parallel in _stages(body):
            if not is_parallel:
                self._serial.append(stage)
                continue
            self._end_serial()
            loop = isinstance(stage, tirx.For)
            self._stages.append(_with_barrier(stage) if loop else stage)

    def _holder(self, tensor: _Tensor, dtype: str) -> Any:
        """The one-dimensional buffer through which a tensor is read and written."""
        name = f"data{len(self.holders)}"
        if tensor.holder not in self.holders:
            whole = [self._dim(d) for d in tensor.whole]
            size = functools.reduce(operator.mul, whole, tirx.const(1, "int64"))
            self.holders[tensor.holder] = tirx.decl_buffer(whole, tensor.dtype, name)
            self._flat[tensor.holder] = tirx.decl_buffer([size], dtype, f"{name}_flat")
        if str(self._flat[tensor.holder].ty.dtype) != dtype:
            raise _Refused
        return self._flat[tensor.holder]

    def _dim(self, dim: Any) -> Any:
        if isinstance(dim, int):
            return tirx.const(dim, "int64")
        return self._dims.setdefault(str(dim), tirx.Var(str(dim), "int64"))

    def _end_serial(self) -> None:
        """What is not parallel goes to the first thread.

        The loop has two rounds, the first of which does something: one of a single round would be
        taken for no loop, and all threads would do the same at a time.
        """
        if self._serial:
            round_ = tirx.Var("round", "int64")
            first = round_ == tirx.const(0, "int64")
            body = tirx.IfThenElse(first, _sequence(self._serial), None)
            two = (tirx.const(0, "int64"), tirx.const(2, "int64"))
            self._stages.append(_with_barrier(tirx.For(round_, *two, tirx.ForKind.PARALLEL, body)))
            self._serial = []

    def finished(self, own: Collection[relax.Expr]) -> tirx.PrimFunc:
        """The function. It allocates what is its ``own``; other holders are its parameters."""
        self._end_serial()
        memory = [
            tirx.AllocBuffer(flat)
            if holder in own
            else tirx.DeclBuffer(flat, data=self.holders[holder].data)
            for holder, flat in self._flat.items()
        ]
        body = _sequence([*memory, _pragma("parallel_launch_point", _sequence(self._stages))])
        given = [buffer for holder, buffer in self.holders.items() if holder not in own]
        attributes = {"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8}
        return tirx.PrimFunc(given, body).with_attrs(attributes)


def _flattened(kernel: tirx.PrimFunc) -> tirx.PrimFunc:
    """The kernel without blocks and with one-dimensional buffers.

    Raises:
        _Refused: its parameters are not all buffers that lie without gaps.
    """
    if not all(isinstance(p.ty, tirx.BufferType) and _is_plain(p.ty) for p in kernel.params):
        raise _Refused
    lowered = tvm.transform.Sequential(
        [
            s_tir.transform.LowerInitBlock(),
            s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
            s_tir.transform.ConvertBlocksToOpaque(),
            s_tir.transform.CompactBufferAllocation(),
            s_tir.transform.LowerMatchBuffer(),
            s_tir.transform.LowerOpaqueBlock(),
            tirx.transform.FlattenBuffer(),
            tirx.transform.StmtSimplify(),
        ]
    )(tvm.IRModule({"kernel": kernel}))
    return lowered["kernel"]


def _without_views(kernel: tirx.PrimFunc) -> tuple[dict[tirx.Var, tirx.Var], tirx.Stmt]:
    """Flat views of parameters, which flattening declares before all else, and what follows."""
    statements = list(kernel.body.seq) if isinstance(kernel.body, tirx.SeqStmt) else [kernel.body]
    flat: dict[tirx.Var, tirx.Var] = {}
    while statements and isinstance(statements[0], tirx.DeclBuffer):
        owner = statements[0].data.args[0]
        if owner not in kernel.params:
            break
        flat[owner] = statements.pop(0).buffer
    return flat, _sequence(statements)


def _stages(statement: tirx.Stmt) -> Iterator[tuple[tirx.Stmt, bool]]:
    """Statements of a kernel that run one after the other, and whether all threads take part.

    Raises:
        _Refused: parallel loops lie inside of something else.
    """
    if not _has_parallel(statement):
        yield statement, False
    elif isinstance(statement, tirx.SeqStmt):
        for part in statement.seq:
            if isinstance(part, tirx.AllocBuffer | tirx.DeclBuffer):
                raise _Refused  # each thread would have its own
            yield from [(part, True)] if isinstance(part, tirx.Bind) else _stages(part)
    elif isinstance(statement, tirx.For) and int(statement.kind) == _PARALLEL:
        extent = Analyzer().simplify(statement.extent)
        if isinstance(extent, tirx.IntImm) and extent.value == 1:
            yield _serial(statement), False  # taken for no loop, all threads would do the same
        else:
            yield statement, True
    elif isinstance(statement, tirx.IfThenElse):
        condition = Analyzer().simplify(statement.condition)
        if not isinstance(condition, tirx.IntImm):
            raise _Refused
        chosen = statement.then_case if condition.value else statement.else_case
        if chosen is not None:
            yield from _stages(chosen)
    else:
        raise _Refused


def _is_plain(kind: tirx.BufferType) -> bool:
    """Whether a buffer begins where its data does, and lies without gaps."""
    offset = kind.elem_offset
    begins = offset is None or (isinstance(offset, tirx.IntImm) and offset.value == 0)
    return begins and not kind.strides


def _serial(loop: tirx.For) -> tirx.Stmt:
    return tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, loop.body)


def _has_parallel(statement: tirx.Stmt) -> bool:
    if isinstance(statement, tirx.For) and int(statement.kind) == _PARALLEL:
        return True
    return any(_has_parallel(part) for part in _parts(statement))


def _parts(statement: tirx.Stmt) -> list[tirx.Stmt]:
    if isinstance(statement, tirx.SeqStmt):
        return list(statement.seq)
    if isinstance(statement, tirx.IfThenElse):
        return [p for p in (statement.then_case, statement.else_case) if p is not None]
    body = getattr(statement, "body", None)
    return [body] if isinstance(body, tirx.Stmt) else []


def _same(one: tirx.PrimFunc, other: tirx.PrimFunc) -> bool:
    return bool(tvm_ffi.structural_equal(one, other, map_free_vars=True))


def _sequence(statements: Sequence[tirx.Stmt]) -> tirx.Stmt:
    return statements[0] if len(statements) == 1 else tirx.SeqStmt(list(statements))


def _pragma(name: str, body: tirx.Stmt) -> tirx.Stmt:
    return tirx.AttrStmt(tirx.const(0, "int32"), f"pragma_{name}", tirx.const(1, "int32"), body)


def _with_barrier(loop: tirx.Stmt) -> tirx.Stmt:
    """A parallel loop at whose end the threads wait for each other."""
    return _pragma("parallel_barrier_when_finish", loop)


def _is_op(binding: relax.Binding, name: str) -> bool:
    value = getattr(binding, "value", None)
    return isinstance(value, relax.Call) and getattr(value.op, "name", "") == name


def _dims(expr: relax.Expr) -> tuple[Any, ...] | None:
    """Dims of a tensor: numbers, or symbols as they are."""
    shape = getattr(getattr(expr, "ty", None), "shape", None)
    values = getattr(shape, "values", None)
    if values is None or not isinstance(expr.ty, relax.TensorType):
        return None
    dims = tuple(int(d) if isinstance(d, tirx.IntImm) else d for d in values)
    symbols = (d for d in dims if not isinstance(d, int))
    return dims if all(isinstance(d, tirx.Var) for d in symbols) else None
