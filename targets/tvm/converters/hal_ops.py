"""Ops of the ``hal`` domain that have kernels of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from tvm import te, tirx

from hal.kernels import moe
from hal.targets.tvm.dims import Dim, Refused
from hal.targets.tvm.lowering import Op, Operand

_FLOAT = frozenset({ir.DataType.FLOAT})


def mixture_of_experts(op: Op) -> Operand:
    """``hal::MixtureOfExperts`` on float32 weights of static shape."""
    x, index = op.require(0, _FLOAT), op.require(1, frozenset({ir.DataType.INT64}))
    weight, gate_up, down = (op.require(i, _FLOAT) for i in (2, 3, 4))
    experts, rows, hidden = gate_up.shape
    choices = index.shape[1]
    if not all(isinstance(d, int) for d in (experts, rows, hidden, choices)):
        raise Refused("MixtureOfExperts with weights of dynamic shape")
    inner, lanes = rows // 2, op.context.shaping.lanes
    activation = op.attribute("activation", "silu")
    if activation not in moe.ACTIVATIONS:
        raise Refused(f"MixtureOfExperts with the activation {activation!r}")
    tokens = x.shape[0]
    if op.context.shaping.plain:
        return _plain_mixture(op, (experts, inner, hidden, choices), moe.ACTIVATIONS[activation])
    first = moe.gate_up(experts, hidden, inner, choices, lanes, activation)
    second = moe.down(experts, hidden, inner, choices, lanes)
    call = op.context.call_kernel
    (h,) = call(first, [x, index, gate_up], [([tokens, choices, inner], "float32")], "moe_gate_up")
    (y,) = call(second, [h, index, weight, down], [([tokens, hidden], "float32")], "moe_down")
    return y


def _plain_mixture(
    op: Op, sizes: tuple[int, int, int, int], activation: Callable[..., Any]
) -> Operand:
    """The same as tensor expressions: both halves of the first product, then the second one.

    An expert out of range adds nothing; its weights are those of one that exists.
    """
    experts, inner, hidden, choices = sizes
    x, index, weight, gate_up, down = op.inputs()
    tokens = x.shape[0]

    def existing(chosen: Any, t: Any, c: Any) -> Any:
        return tirx.max(tirx.min(chosen(t, c), _const(experts - 1)), _const(0))

    def share(shares: Any, chosen: Any, t: Any, c: Any) -> Any:
        here = tirx.all(chosen(t, c) >= 0, chosen(t, c) < experts)
        return tirx.Select(here, shares(t, c), tirx.const(0.0, "float32"))

    def halves(rows: Any, chosen: Any, weights: Any) -> Any:
        k = te.reduce_axis((0, hidden), name="k")
        return te.compute(
            [_const(tokens), choices, 2 * inner],
            lambda t, c, j: te.sum(rows(t, k) * weights(existing(chosen, t, c), j, k), axis=k),
            name="halves",
        )

    both = op.te(halves, x, index, gate_up)
    h = op.compute(
        [tokens, choices, inner],
        lambda v, i: activation(v(*i)) * v(i[0], i[1], i[2] + inner),
        both,
    )

    def mixed(values: Any, chosen: Any, shares: Any, weights: Any) -> Any:
        c, j = te.reduce_axis((0, choices), name="c"), te.reduce_axis((0, inner), name="j")
        return te.compute(
            [_const(tokens), hidden],
            lambda t, n: te.sum(
                share(shares, chosen, t, c)
                * values(t, c, j)
                * weights(existing(chosen, t, c), n, j),
                axis=[c, j],
            ),
            name="mixed",
        )

    return op.te(mixed, h, index, weight, down)


def _const(dim: Dim) -> Any:
    return tirx.const(dim, "int64") if isinstance(dim, int) else dim


CONVERTERS: dict[str, Callable[[Op], Any]] = {"MixtureOfExperts": mixture_of_experts}
"""Converters of this domain by op type."""
