"""``LinearAttention`` and ``CausalConvWithState``: layers that carry a state of fixed size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax, tirx

from hal.kernels import causal_conv as conv_kernels
from hal.kernels import linear_attention as kernels
from hal.targets.tvm.dims import Dim, Refused
from hal.targets.tvm.lowering import Op, Operand

_FLOAT = frozenset({ir.DataType.FLOAT})
_GATED, _DELTA = ("gated", "gated_delta"), ("delta", "gated_delta")


def _known(op: Op, *dims: Dim) -> list[int]:
    if not all(isinstance(d, int) for d in dims):
        raise Refused(f"{op.node.op_type} with dynamic sizes of heads or channels")
    return [d for d in dims if isinstance(d, int)]


def _zeros(op: Op, shape: Sequence[Dim]) -> Operand:
    return op.context.emit(relax.op.zeros(relax.ShapeExpr(list(shape)), "float32"))


def _given(op: Op, index: int) -> Operand | None:
    return op.require(index, _FLOAT) if op.has(index) else None


def linear_attention(op: Op) -> list[Operand]:
    """``LinearAttention`` of every update rule, in float32."""
    q, k, v = (op.require(i, _FLOAT) for i in range(3))
    q_heads, heads = op.attribute("q_num_heads"), op.attribute("kv_num_heads")
    rule = op.attribute("update_rule", "gated_delta")
    keys, values, queries = _known(op, k.shape[2], v.shape[2], q.shape[2])
    size, width = keys // heads, values // heads
    batch, length = q.shape[:2]
    past, decay, rate = (_given(op, i) for i in (3, 4, 5))
    if (decay is not None) != (rule in _GATED) or (rate is not None) != (rule in _DELTA):
        raise Refused(f"LinearAttention with the update rule {rule!r} and other inputs than its")
    form = kernels.Form(
        heads,
        q_heads // heads,
        size,
        width,
        _known(op, decay.shape[2])[0] // heads if decay is not None else 0,
        _known(op, rate.shape[2])[0] if rate is not None else 0,
        float(op.attribute("scale", 0.0) or (queries // q_heads) ** -0.5),
    )
    kernel = kernels.linear_attention(form, op.context.shaping.lanes)
    past = past or _zeros(op, (batch, heads, size, width))
    if decay is not None:  # once for each token, not for each block of the state
        decay = op.compute(decay.shape, lambda x, i: tirx.exp(x(*i)), decay)
    gates = [x or _zeros(op, (batch, length, 1)) for x in (decay, rate)]
    outputs = [
        ((batch, length, q_heads * width), "float32"),
        ((batch, heads, size, width), "float32"),
    ]
    return op.context.call_kernel(kernel, [q, k, v, past, *gates], outputs, "linear_attention")


def causal_conv(op: Op) -> list[Operand]:
    """``CausalConvWithState`` in float32."""
    x, weight = op.require(0, _FLOAT), op.require(1, _FLOAT)
    channels, taps = _known(op, weight.shape[0], weight.shape[2])
    activation = op.attribute("activation", "none")
    if activation not in conv_kernels.ACTIVATIONS or taps < 2:
        raise Refused(f"CausalConvWithState of {taps} taps with the activation {activation!r}")
    bias = _given(op, 2) or op.context.embed(np.zeros(channels, np.float32))
    state = (x.shape[0], channels, taps - 1)
    past = _given(op, 3) or _zeros(op, state)
    kernel = conv_kernels.causal_conv(channels, taps, activation)
    outputs = [(x.shape, "float32"), (state, "float32")]
    return op.context.call_kernel(kernel, [x, weight, bias, past], outputs, "causal_conv")


CONVERTERS: dict[str, Callable[[Op], Any]] = {
    "LinearAttention": linear_attention,
    "CausalConvWithState": causal_conv,
}
"""Converters of this family by op type."""
