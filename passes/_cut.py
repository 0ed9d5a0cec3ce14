"""Where to cut a per-token program: the carried values that cost least per step.

Everything is priced in bytes that a decoding step moves for one old token of one sequence:

* a carried value: its bytes, read by the attention;
* the attention: two operations per query head and channel, for scores and for the weighted sum;
* an op computed again for old tokens: its operations, and its result written and read.

Operations become bytes by the *machine balance*, the operations that the target does in the time in
which it moves one byte. Cheapest is a minimum cut of a flow network, and two networks are asked:

* *recompute*: whatever is after the cut is computed again at each step;
* *absorb*: what is after the cut is linear, so it moves into the queries and the output, and
  attention works on the carried values as one head that all query heads share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import networkx as nx
import onnx_ir as ir

from hal.descriptor import Descriptor
from hal.ir.graph import dtype_name
from hal.passes._tokens import TokenPaths

DEFAULT_BALANCE = 4.0
"""Operations per byte where the descriptor does not say. Low on purpose: small machines do some
hundred Gflop/s on some tens of GB/s, at best; on one that nobody has described, arithmetic must pay
clearly before it is traded for bytes."""

_UNIT = 1 << 20
"""Capacities are whole numbers of 1/_UNIT bytes; one of them per op breaks ties."""

_FEWEST = 1 << 30
"""Weight of a carried byte where nothing else shall count."""


@dataclasses.dataclass(frozen=True)
class Option:
    """One way to carry: ``form`` is ``expanded``, ``recomputed`` or ``latent`` (absorbed)."""

    form: str
    cut: tuple[ir.Value, ...]
    bytes: int
    """Carried per token of one sequence."""
    price: float
    """Bytes, and operations as bytes, per old token and step."""


def machine_balance(descriptor: Descriptor | None, dtype: ir.DataType | None) -> float:
    """Peak operations per second over bytes per second of main memory; the default if unknown."""
    if descriptor is None or dtype is None:
        return DEFAULT_BALANCE
    peak = descriptor.peak(dtype_name(dtype)) or descriptor.peak("float32")
    bandwidth = descriptor.memory_bandwidth()
    return peak / bandwidth if peak and bandwidth else DEFAULT_BALANCE


def expanded(paths: TokenPaths, balance: float) -> Option:
    """Carry the operands of the attention."""
    cut = tuple(dict.fromkeys((paths.key, paths.value)))
    return _recompute_option(paths, cut, balance)


def recomputed(paths: TokenPaths, balance: float, *, fewest: bool = False) -> Option:
    """The cheapest cut if all that follows is computed again; ``fewest``: the smallest one."""
    weight = _FEWEST if fewest else 1

    def again(value: ir.Value) -> float:
        return _again(paths, value, balance)

    cut = _minimum_cut(paths, set(), lambda v: weight * paths.bytes(v), again)
    return _recompute_option(paths, cut, balance)


def absorbed(paths: TokenPaths, balance: float, *, fewest: bool = False) -> Option:
    """The cheapest cut if all that follows is absorbed; ``fewest``: the smallest one."""
    weight = _FEWEST if fewest else 1
    for_key, for_value = paths.reaching(paths.key), paths.reaching(paths.value)
    bent = {v for v, step in paths.steps.items() if step is not None and not step.linear}

    def carried(value: ir.Value) -> float:
        sides = (value in for_key) + (value in for_value)
        work = 2 * paths.heads * paths.per_token(value) * sides
        return weight * paths.bytes(value) + work / balance

    cut = _minimum_cut(paths, bent, carried, lambda _: 0.0)
    size = sum(paths.bytes(v) for v in cut)
    return Option("latent", cut, size, sum(carried(v) - (weight - 1) * paths.bytes(v) for v in cut))


def after_cut(paths: TokenPaths, cut: Iterable[ir.Value]) -> set[ir.Value]:
    """Values between the cut and the operands, the cut itself left out."""
    found, todo = set[ir.Value](), [paths.key, paths.value]
    stop = set(cut)
    while todo:
        value = todo.pop()
        if value in stop or value in found:
            continue
        found.add(value)
        step = paths.steps[value]
        todo += step.inputs if step is not None else ()
    return found


def _recompute_option(paths: TokenPaths, cut: tuple[ir.Value, ...], balance: float) -> Option:
    again = after_cut(paths, cut)
    size = sum(paths.bytes(v) for v in cut)
    price = size + sum(_again(paths, v, balance) for v in again)
    channels = sum(_channels(paths, v) for v in (paths.key, paths.value))
    price += 2 * paths.heads * channels / balance
    return Option("recomputed" if again else "expanded", cut, size, price)


def _channels(paths: TokenPaths, operand: ir.Value) -> int:
    return int(paths.shapes.shape[operand][-1])


def _again(paths: TokenPaths, value: ir.Value, balance: float) -> float:
    """Price of computing a value again: its operations, its result written and read."""
    step = paths.steps[value]
    assert step is not None
    return step.flops / balance + (2 * paths.bytes(value) if step.moves else 0)


def _minimum_cut(
    paths: TokenPaths,
    sources: set[ir.Value],
    carried: Callable[[ir.Value], float],
    again: Callable[[ir.Value], float],
) -> tuple[ir.Value, ...]:
    """Values to carry: a minimum cut between the roots (and ``sources``) and the operands.

    A value is an edge from its ``in`` to its ``out`` with the price of carrying it; an edge from
    the source to ``in`` is cut, and so paid, when the value is computed again. Of equal cuts the
    one with the fewest ops after it is taken.
    """
    network: Any = nx.DiGraph()
    for value, step in paths.steps.items():
        enter, leave = ("in", value), ("out", value)
        network.add_edge(enter, leave, capacity=_whole(carried(value)))
        if step is None or value in sources:
            network.add_edge("source", enter)  # no capacity: infinite
            continue
        network.add_edge("source", enter, capacity=_whole(again(value)) + 1)
        for used in step.inputs:
            network.add_edge(("out", used), enter)
    for operand in (paths.key, paths.value):
        network.add_edge(("out", operand), "sink")
    _, (before, _) = nx.minimum_cut(network, "source", "sink")
    return tuple(v for v in paths.steps if ("in", v) in before and ("out", v) not in before)


def _whole(price: float) -> int:
    return round(price * _UNIT)
