"""Recurrences over the sequence as one operator each, through the kernels' public functions.

Modelling code calls what the kernel libraries (flash-linear-attention, causal-conv1d and others)
call ``chunk_gated_delta_rule``, ``causal_conv1d_fn`` or ``…_chunk_scan_combined``. While
:func:`fused_recurrences` is active, those functions are ours: operators that hold for every length,
where the libraries' are written for one device, and transformers' own substitutes unroll to the
length they are traced with.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.activations import ACT2FN

from hal.errors import ExportError
from hal.frontends import recurrent_ops

__all__ = ["fused_recurrences"]

_EPSILON = 1e-6  # of the libraries' normalization of queries and keys


def _no_packing(name: str, *markers: Any) -> None:
    if any(marker is not None for marker in markers):
        raise ExportError(
            f"the model calls {name} on several sequences packed into one",
            "export it for one sequence in each row of the batch",
        )


def _normalized(x: torch.Tensor) -> torch.Tensor:
    """Vectors of length 1: ``x / sqrt(sum(x^2) + epsilon)`` said as an RMS normalization."""
    size = x.shape[-1]
    weight = x.new_full((size,), size**-0.5)
    return torch.nn.functional.rms_norm(x, (size,), weight, _EPSILON / size)


def _delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Any = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``q``, ``k`` ``[B, S, H', K]``; ``v [B, S, H, V]``, H a multiple of H'; ``beta [B, S, H]``.

    The decay's logarithm ``g`` is ``[B, S, H]``, or ``[B, S, H, K]`` if each key channel has its
    own. Returns ``[B, S, H, V]`` and the state ``[B, H, K, V]`` after the last token.
    """
    _no_packing("a delta rule", cu_seqlens)
    batch, length, heads, width = v.shape
    size, dtype = q.shape[-1], q.dtype
    q, k, v, g, beta = (x.to(torch.float32) for x in (q, k, v, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = _normalized(q), _normalized(k)
    if q.shape[2] != heads:  # each of them serves several value heads that follow each other
        q, k = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (q, k))
    if initial_state is None:
        initial_state = q.new_zeros(batch, heads, size, width)
    y, state = recurrent_ops.linear_attention(
        *(x.reshape(batch, length, -1) for x in (q, k, v)),
        initial_state.to(torch.float32),
        g.reshape(batch, length, -1),
        beta,
        heads,
        size**-0.5 if scale is None else scale,
        "gated_delta",
    )
    y = y.reshape(batch, length, heads, width).to(dtype)
    return y, state if output_final_state else None


def _causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    seq_idx: Any = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Any = None,
    activation: str | None = None,
    cu_seqlens: Any = None,
    **_: Any,
) -> Any:
    """``x [B, C, S]`` by ``weight [C, k]``, each channel by itself, looking back only."""
    _no_packing("a causal convolution", seq_idx, cu_seqlens, final_states_out)
    fused = "silu" if activation in ("silu", "swish") else "none"
    y, state = recurrent_ops.causal_conv_with_state(
        x.to(weight.dtype), weight.unsqueeze(1), bias, initial_states, fused
    )
    if activation is not None and fused == "none":
        y = ACT2FN[activation](y)
    y = y.to(x.dtype)
    return (y, state) if return_final_states else y


def _state_space(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    chunk_size: int = 0,
    D: torch.Tensor | None = None,  # noqa: N803 - the library's name
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    seq_idx: Any = None,
    cu_seqlens: Any = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **_: Any,
) -> Any:
    """A state space with a scalar decay for each head: linear attention of ``c`` to ``b``.

    ``x [B, S, H, P]``, step sizes ``dt [B, S, H]``, ``a [H]``, ``b`` and ``c`` ``[B, S, G, N]``
    with H a multiple of G. The state is ``[B, H, P, N]``.
    """
    _no_packing("a state space", seq_idx, cu_seqlens)
    batch, length, heads, width = x.shape
    size, dtype = b.shape[-1], x.dtype
    x, b, c = x.float(), b.float(), c.float()
    dt = dt.float() if dt_bias is None else (dt + dt_bias.to(dt.dtype)).float()
    if dt_softplus:
        dt = torch.nn.functional.softplus(dt)
    if tuple(dt_limit) != (0.0, float("inf")) or not dt_softplus:
        dt = torch.clamp(dt, min=dt_limit[0], max=dt_limit[1])
    if b.shape[2] != heads:
        b, c = (y.repeat_interleave(heads // y.shape[2], dim=2) for y in (b, c))
    if initial_states is None:
        initial_states = x.new_zeros(batch, heads, width, size)
    y, state = recurrent_ops.linear_attention(
        c.reshape(batch, length, -1),
        b.reshape(batch, length, -1),
        (x * dt[..., None]).reshape(batch, length, -1),
        initial_states.float().transpose(2, 3),
        a.float() * dt,
        None,
        heads,
        1.0,
        "gated",
    )
    y = y.reshape(batch, length, heads, width)
    if D is not None:
        y = y + D.float().reshape(heads, -1) * x
    if z is not None:
        y = y * torch.nn.functional.silu(z.float())
    y = y.to(dtype)
    return (y, state.transpose(2, 3)) if return_final_states else y


_OURS: dict[str, Callable[..., Any]] = {
    "chunk_gated_delta_rule": _delta_rule,
    "fused_recurrent_gated_delta_rule": _delta_rule,
    "chunk_kda": _delta_rule,
    "fused_recurrent_kda": _delta_rule,
    "chunk_scan_combined": _state_space,
    "causal_conv1d_fn": _causal_conv,
}
"""Ours, by the libraries' names or how those end. ``causal_conv1d_update`` writes into its argument
and is called for one token only, in a branch that a graph for all lengths does not take."""


def _substitute(function: Any) -> Callable[..., Any] | None:
    """Ours for a library's function, also if transformers has put one of its own in its place."""
    while inspect.isfunction(function):
        name = function.__name__
        names = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        if "func_name" in names and "package" in names:  # transformers' choice between the two
            name = str(names["func_name"].cell_contents)
        for known, ours in _OURS.items():
            if name == known or name.endswith(f"_{known}"):
                return ours
        function = getattr(function, "__wrapped__", None)
    return None


def _namespaces(model: torch.nn.Module) -> Iterator[dict[str, Any]]:
    """Where modelling code may have such a function: globals of its files, module attributes."""
    seen = set()
    for module in model.modules():
        yield vars(module)
        for cls in type(module).__mro__:
            file = sys.modules.get(cls.__module__)
            if file is not None and file not in seen and not cls.__module__.startswith("torch."):
                seen.add(file)
                yield vars(file)


@contextlib.contextmanager
def fused_recurrences(model: torch.nn.Module) -> Iterator[None]:
    """Let ``model``'s code call our operators inside the block; restores what was there before."""
    before: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for namespace in _namespaces(model):
            for name, value in list(namespace.items()):
                ours = _substitute(value)
                if ours is not None:
                    before.append((namespace, name, value))
                    namespace[name] = ours
        yield
    finally:
        for namespace, name, value in before:
            namespace[name] = value
