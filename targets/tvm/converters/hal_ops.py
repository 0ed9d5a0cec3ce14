"""Ops of the ``hal`` domain that have kernels of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from hal.kernels import moe
from hal.targets.tvm.dims import Refused
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
    first = moe.gate_up(experts, hidden, inner, choices, lanes, activation)
    second = moe.down(experts, hidden, inner, choices, lanes)
    call = op.context.call_kernel
    (h,) = call(first, [x, index, gate_up], [([tokens, choices, inner], "float32")], "moe_gate_up")
    (y,) = call(second, [h, index, weight, down], [([tokens, hidden], "float32")], "moe_down")
    return y


CONVERTERS: dict[str, Callable[[Op], Any]] = {"MixtureOfExperts": mixture_of_experts}
"""Converters of this domain by op type."""
