"""From a Relax function of static shapes to a list of kernel calls and a plan of its memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx

from hal.errors import UnsupportedError

ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class Tensor:
    """What a kernel is given: a shape and dtype over a stretch of memory, ``root`` its number."""

    root: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Size in memory."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclasses.dataclass
class Memory:
    """A stretch of memory; ``constant`` is what it holds from the beginning, if anything.

    It is in use from the call ``first`` to the call ``last``, both included.
    """

    bytes: int
    constant: np.ndarray | None = None
    first: int = -1
    last: int = -1
    offset: int = 0


@dataclasses.dataclass(frozen=True)
class Call:
    """A kernel and its tensors, results among them."""

    kernel: str
    tensors: tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that a program needs besides its kernels.

    ``kept``: tensors among the inputs that keep what they hold from call to call.
    """

    memory: tuple[Memory, ...]
    calls: tuple[Call, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    arena_bytes: int
    weight_bytes: int
    kept: tuple[Tensor, ...] = ()


def plan(
    module: tvm.IRModule, weights: Sequence[np.ndarray], kept: Collection[int] = ()
) -> Plan:  # fmt: skip
    """Plan the function ``main``; its last parameters are ``weights``.

    ``kept`` are places among its first parameters of tensors that are written in place and keep
    what they hold; they are :attr:`Plan.kept` then, and no inputs.

    ``module`` is behind ``CallTIRRewrite``: results are allocated and passed to kernels.

    Raises:
        UnsupportedError: it does something that only a runtime can, or has dynamic shapes.
    """
    return _Planner(module["main"]).run(weights, kept)


class _Planner:
    def __init__(self, function: relax.Function) -> None:
        self._function = function
        self._memory: list[Memory] = []
        self._tensors: dict[relax.Var, Tensor] = {}
        self._tuples: dict[relax.Var, relax.Tuple] = {}
        self._calls: list[Call] = []

    def run(self, weights: Sequence[np.ndarray], kept: Collection[int]) -> Plan:
        parameters = list(self._function.params)
        split = len(parameters) - len(weights)
        inputs = tuple(self._new(p) for p in parameters[:split])
        for parameter, array in zip(parameters[split:], weights, strict=True):
            self._new(parameter, array)
        body = self._function.body
        for block in body.blocks:
            for binding in block.bindings:
                self._binding(binding)
        outputs = tuple(self._get(field) for field in self._fields(body.body))
        for tensor in inputs:
            self._memory[tensor.root].first = -1
        for tensor in (*outputs, *(inputs[place] for place in kept)):
            self._memory[tensor.root].last = len(self._calls)
        weight_bytes = _in_a_row([m for m in self._memory if m.constant is not None])
        arena = _shared([m for m in self._memory if m.constant is None])
        memory, calls = tuple(self._memory), tuple(self._calls)
        held = tuple(inputs[place] for place in kept)
        given = tuple(t for place, t in enumerate(inputs) if place not in kept)
        return Plan(memory, calls, given, outputs, arena, weight_bytes, held)

    def _binding(self, binding: Any) -> None:
        value, var = binding.value, binding.var
        name = getattr(getattr(value, "op", None), "name", "")
        if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.GlobalVar):
            self._call(value)
        elif name == "relax.builtin.alloc_tensor":
            self._new(var)
        elif name == "relax.reshape":
            source = self._get(value.args[0])
            self._tensors[var] = dataclasses.replace(source, shape=_shape(var))
        elif isinstance(value, relax.Tuple):
            self._tuples[var] = value
        elif isinstance(value, relax.TupleGetItem):
            self._tensors[var] = self._get(self._tuples[value.tuple_value].fields[value.index])
        elif isinstance(value, relax.Var):
            self._tensors[var] = self._get(value)
        else:
            raise UnsupportedError(
                f"a program without a runtime cannot do {name or type(value).__name__!r}",
                "choose a target with a runtime",
            )

    def _call(self, value: relax.Call) -> None:
        tensors = tuple(self._get(argument) for argument in value.args)
        here = len(self._calls)
        for tensor in tensors:
            memory = self._memory[tensor.root]
            memory.first = min(memory.first, here) if memory.last >= 0 else here
            memory.last = here
        self._calls.append(Call(value.op.name_hint, tensors))

    def _new(self, expr: Any, constant: np.ndarray | None = None) -> Tensor:
        tensor = Tensor(len(self._memory), _shape(expr), str(expr.ty.dtype))
        self._memory.append(Memory(tensor.bytes, constant))
        if isinstance(expr, relax.Var):
            self._tensors[expr] = tensor
        return tensor

    def _get(self, expr: Any) -> Tensor:
        if isinstance(expr, relax.Var):
            return self._tensors[expr]
        if isinstance(expr, tvm.ir.GenericConst):
            return self._new(expr, expr.value.numpy())
        raise UnsupportedError(
            f"a program without a runtime cannot pass {type(expr).__name__!r} to a kernel",
            "choose a target with a runtime",
        )

    def _fields(self, expr: Any) -> list[Any]:
        if isinstance(expr, relax.Var) and expr in self._tuples:
            return list(self._tuples[expr].fields)
        return list(expr.fields) if isinstance(expr, relax.Tuple) else [expr]


def _shape(expr: Any) -> tuple[int, ...]:
    dims = expr.ty.shape.values
    if not all(isinstance(d, tirx.IntImm) for d in dims):
        raise UnsupportedError(
            f"a program without a runtime has static shapes, and one of its tensors is {expr.ty}",
            "give every dynamic dim an extent: --dim NAME=N",
        )
    return tuple(int(d) for d in dims)


def _in_a_row(memory: Sequence[Memory]) -> int:
    end = 0
    for each in memory:
        each.offset, end = end, end + each.bytes + -each.bytes % ALIGNMENT
    return end


def _shared(memory: Sequence[Memory]) -> int:
    """Offsets such that what is in use at the same time does not overlap; the bytes of all.

    The largest come first, each at the lowest place that is free while it is used (greedy by size;
    Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference", 2020).
    """
    placed: list[Memory] = []
    for each in sorted(memory, key=lambda m: -m.bytes):
        others = [o for o in placed if o.first <= each.last and each.first <= o.last]
        at = 0
        for other in sorted(others, key=lambda m: m.offset):
            if at + each.bytes <= other.offset:
                break
            end = other.offset + other.bytes
            at = max(at, end + -end % ALIGNMENT)
        each.offset = at
        placed.append(each)
    return max((m.offset + m.bytes for m in placed), default=0)
