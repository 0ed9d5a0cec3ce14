"""A mixture of experts that reads the weights of chosen experts only.

Two kernels. The first computes ``act(gate) * up`` for every choice of every token, the second
projects down and adds up with the routing weights. Both walk block of rows, expert, token, so that
a block of an expert's weights is read once for all tokens that chose the expert, and never when
none did. A dot product runs along the contiguous axis in vectors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script import tirx as T  # noqa: N812

from hal.kernels.vectors import span, spread, vector_lanes

ROWS = 4
"""Rows of a weight matrix whose dot products advance together."""


def _silu(x: Any) -> Any:
    return x / (T.float32(1) + T.exp(T.float32(0) - x))


def _gelu(x: Any) -> Any:
    return T.float32(0.5) * x * (T.float32(1) + tirx.erf(x * T.float32(math.sqrt(0.5))))


def _gelu_tanh(x: Any) -> Any:
    inner = T.float32(math.sqrt(2 / math.pi)) * (x + T.float32(0.044715) * x * x * x)
    return T.float32(0.5) * x * (T.float32(1) + T.tanh(inner))


def _relu(x: Any) -> Any:
    return T.max(x, T.float32(0))


ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
}
"""Activations of the gate by the name that the op's attribute uses."""


def _rows(extent: int) -> int:
    return next(r for r in (ROWS, 2, 1) if extent % r == 0)


@functools.lru_cache(maxsize=64)
def gate_up(  # noqa: C901 - kernel text
    experts: int, hidden: int, inner: int, choices: int, lanes: int, activation: str
) -> Any:
    """``h[t, k] = act(gate[e] @ x[t]) * (up[e] @ x[t])`` with ``e = index[t, k]``; float32.

    ``x [T, hidden]``, ``index [T, choices]`` int64, ``w [experts, 2 * inner, hidden]`` with the
    gate rows first, ``h [T, choices, inner]``. Rows of ``h`` whose index is out of range are zero.
    """
    act = ACTIVATIONS[activation]
    v, rows = vector_lanes(hidden, lanes), _rows(inner)
    kind = f"float32x{v}" if v > 1 else "float32"
    steps = hidden // v

    @T.prim_func(s_tir=True)
    def moe_gate_up(  # type: ignore[no-untyped-def]  # noqa: C901 - kernel text
        x_data: T.handle, i_data: T.handle, w_data: T.handle, h_data: T.handle
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        t_count = T.int64()
        x = T.match_buffer(x_data, (t_count, hidden), "float32")
        index = T.match_buffer(i_data, (t_count, choices), "int64")
        w = T.match_buffer(w_data, (experts, 2 * inner, hidden), "float32")
        h = T.match_buffer(h_data, (t_count, choices, inner), "float32")
        with T.sblock("root"):
            T.reads(
                x[0:t_count, 0:hidden],
                index[0:t_count, 0:choices],
                w[0:experts, 0 : 2 * inner, 0:hidden],
            )
            T.writes(h[0:t_count, 0:choices, 0:inner])
            for b in T.parallel(inner // rows):
                acc = T.alloc_buffer((2 * rows,), kind, scope="local")
                lane_sums = T.alloc_buffer((2 * rows,), "float32", scope="local")
                spill = T.alloc_buffer((v,), "float32", scope="local")
                for t in T.serial(t_count):
                    for k in T.serial(choices):
                        for r in T.serial(rows):
                            h[t, k, b * rows + r] = T.float32(0)
                for e in T.serial(experts):
                    for t in T.serial(t_count):
                        for k in T.serial(choices):
                            if index[t, k] == T.int64(e):
                                for r in T.unroll(2 * rows):
                                    acc[r] = spread(T.float32(0), v)
                                for s in T.serial(steps):
                                    for r in T.unroll(rows):
                                        acc[r] = (
                                            acc[r]
                                            + x[t, span(s * v, v)]
                                            * w[e, b * rows + r, span(s * v, v)]
                                        )
                                        acc[rows + r] = (
                                            acc[rows + r]
                                            + x[t, span(s * v, v)]
                                            * w[e, inner + b * rows + r, span(s * v, v)]
                                        )
                                for r in T.unroll(2 * rows):
                                    spill[span(0, v)] = acc[r]
                                    lane_sums[r] = T.float32(0)
                                    for j in T.serial(v):
                                        lane_sums[r] = lane_sums[r] + spill[j]
                                for r in T.unroll(rows):
                                    h[t, k, b * rows + r] = act(lane_sums[r]) * lane_sums[rows + r]

    return moe_gate_up


@functools.lru_cache(maxsize=64)
def down(experts: int, hidden: int, inner: int, choices: int, lanes: int) -> Any:  # noqa: C901
    """``y[t] = sum over k of weight[t, k] * (w[index[t, k]] @ h[t, k])``; float32.

    ``h [T, choices, inner]``, ``index [T, choices]`` int64, ``weight [T, choices]``,
    ``w [experts, hidden, inner]``, ``y [T, hidden]``. An index out of range adds nothing.
    """
    v, rows = vector_lanes(inner, lanes), _rows(hidden)
    kind = f"float32x{v}" if v > 1 else "float32"
    steps = inner // v

    @T.prim_func(s_tir=True)
    def moe_down(  # type: ignore[no-untyped-def]  # noqa: C901 - kernel text
        h_data: T.handle, i_data: T.handle, g_data: T.handle, w_data: T.handle, y_data: T.handle
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        t_count = T.int64()
        h = T.match_buffer(h_data, (t_count, choices, inner), "float32")
        index = T.match_buffer(i_data, (t_count, choices), "int64")
        weight = T.match_buffer(g_data, (t_count, choices), "float32")
        w = T.match_buffer(w_data, (experts, hidden, inner), "float32")
        y = T.match_buffer(y_data, (t_count, hidden), "float32")
        with T.sblock("root"):
            T.reads(
                h[0:t_count, 0:choices, 0:inner],
                index[0:t_count, 0:choices],
                weight[0:t_count, 0:choices],
                w[0:experts, 0:hidden, 0:inner],
            )
            T.writes(y[0:t_count, 0:hidden])
            for b in T.parallel(hidden // rows):
                acc = T.alloc_buffer((rows,), kind, scope="local")
                lane_sums = T.alloc_buffer((rows,), "float32", scope="local")
                spill = T.alloc_buffer((v,), "float32", scope="local")
                for t in T.serial(t_count):
                    for r in T.serial(rows):
                        y[t, b * rows + r] = T.float32(0)
                for e in T.serial(experts):
                    for t in T.serial(t_count):
                        for k in T.serial(choices):
                            if index[t, k] == T.int64(e):
                                for r in T.unroll(rows):
                                    acc[r] = spread(T.float32(0), v)
                                for s in T.serial(steps):
                                    for r in T.unroll(rows):
                                        acc[r] = (
                                            acc[r]
                                            + h[t, k, span(s * v, v)]
                                            * w[e, b * rows + r, span(s * v, v)]
                                        )
                                for r in T.unroll(rows):
                                    spill[span(0, v)] = acc[r]
                                    lane_sums[r] = T.float32(0)
                                    for j in T.serial(v):
                                        lane_sums[r] = lane_sums[r] + spill[j]
                                for r in T.unroll(rows):
                                    y[t, b * rows + r] = (
                                        y[t, b * rows + r] + weight[t, k] * lane_sums[r]
                                    )

    return moe_down
