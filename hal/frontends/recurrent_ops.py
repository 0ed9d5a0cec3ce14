"""torch operators for ONNX's ``LinearAttention`` and ``CausalConvWithState``.

``torch.ops.hal.linear_attention`` and ``torch.ops.hal.causal_conv_with_state`` mean what the ONNX
ops mean, so that a recurrence over the sequence is one node of an exported program, for any length,
and one node of the graph. Who calls them: :mod:`.recurrence`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx.defs
import onnx_ir as ir
import onnxscript.values
import torch

_LATER = "hal.later"
"""Domain of the new nodes until the model is brought to our operator set: torch's exporter writes
an older one, which does not have these ops."""

_SINCE = 27


def _op(name: str) -> onnxscript.values.Op:
    known = onnx.defs.get_schema(name, _SINCE)
    schema = onnx.defs.OpSchema(
        name,
        _LATER,
        1,
        inputs=list(known.inputs),
        outputs=list(known.outputs),
        type_constraints=[
            (c.type_param_str, list(c.allowed_type_strs), "") for c in known.type_constraints
        ],
        attributes=list(known.attributes.values()),
    )
    return onnxscript.values.Op(onnxscript.values.Opset(_LATER, 1), name, schema)


_LINEAR_ATTENTION = _op("LinearAttention")
_CAUSAL_CONV = _op("CausalConvWithState")


def as_standard_ops(model: ir.Model) -> None:
    """Move the nodes into ONNX's own domain; ``model`` is at our operator set by now."""
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        for node in graph.all_nodes():
            if node.domain == _LATER:
                node.domain = ""
        graph.opset_imports.pop(_LATER, None)


@torch.library.custom_op("hal::linear_attention", mutates_args=())
def linear_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_state: torch.Tensor,
    decay: torch.Tensor | None,
    beta: torch.Tensor | None,
    heads: int,
    scale: float,
    update_rule: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """ONNX ``LinearAttention`` with as many query heads as key/value heads, token by token.

    Args:
        query: ``[B, S, heads * K]``, as is ``key``.
        key: see ``query``.
        value: ``[B, S, heads * V]``.
        past_state: ``[B, heads, K, V]``.
        decay: logarithm of the decay, ``[B, S, heads]`` or ``[B, S, heads * K]``.
        beta: update rate, ``[B, S, heads]``.
        heads: number of heads.
        scale: factor of the output.
        update_rule: ``linear``, ``gated``, ``delta`` or ``gated_delta``.

    Returns:
        ``[B, S, heads * V]``, and the state after the last token.
    """
    batch, length, _ = query.shape
    q, k, v = (x.reshape(batch, length, heads, -1) for x in (query, key, value))
    state, out = past_state.clone(), []
    for t in range(length):
        if decay is not None:
            state = state * decay[:, t].reshape(batch, heads, -1, 1).exp()
        write = v[:, t]
        if beta is not None:
            seen = torch.einsum("bhkv,bhk->bhv", state, k[:, t])
            write = (write - seen) * beta[:, t].reshape(batch, -1, 1)
        state = state + k[:, t, :, :, None] * write[:, :, None, :]
        out.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) * scale)
    y = torch.stack(out, 1) if out else v
    return y.reshape(batch, length, -1), state


@linear_attention.register_fake
def _linear_attention_fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_state: torch.Tensor,
    decay: torch.Tensor | None,
    beta: torch.Tensor | None,
    heads: int,
    scale: float,
    update_rule: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(value), torch.empty_like(past_state)


def _onnx_linear_attention(
    query: Any,
    key: Any,
    value: Any,
    past_state: Any,
    decay: Any,
    beta: Any,
    heads: int,
    scale: float,
    update_rule: str,
) -> Any:
    return _LINEAR_ATTENTION(
        query,
        key,
        value,
        past_state,
        decay,
        beta,
        q_num_heads=heads,
        kv_num_heads=heads,
        scale=scale,
        update_rule=update_rule,
    )


@torch.library.custom_op("hal::causal_conv_with_state", mutates_args=())
def causal_conv_with_state(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    past_state: torch.Tensor | None,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """ONNX ``CausalConvWithState``: each channel by itself, looking back only.

    Args:
        x: ``[B, C, S]``.
        weight: ``[C, 1, k]``.
        bias: ``[C]``.
        past_state: the ``k - 1`` positions before, ``[B, C, k - 1]``; zeros if left out.
        activation: ``silu`` or ``none``.

    Returns:
        ``[B, C, S]``, and the last ``k - 1`` positions of past and ``x``.
    """
    channels, _, taps = weight.shape
    if past_state is None:
        past_state = x.new_zeros(x.shape[0], channels, taps - 1)
    padded = torch.cat([past_state, x], dim=-1)
    y = torch.nn.functional.conv1d(padded, weight, bias, groups=channels)
    y = torch.nn.functional.silu(y) if activation == "silu" else y
    return y, padded[..., padded.shape[-1] - (taps - 1) :].clone()


@causal_conv_with_state.register_fake
def _causal_conv_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    past_state: torch.Tensor | None,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), x.new_empty(*x.shape[:2], weight.shape[-1] - 1)


def _onnx_causal_conv(x: Any, weight: Any, bias: Any, past_state: Any, activation: str) -> Any:
    return _CAUSAL_CONV(x, weight, bias, past_state, activation=activation)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.hal.linear_attention.default: _onnx_linear_attention,
    torch.ops.hal.causal_conv_with_state.default: _onnx_causal_conv,
}
"""Operator overloads → functions that emit nodes, for ``torch.onnx.export``."""
