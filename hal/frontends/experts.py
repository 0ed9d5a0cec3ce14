"""Mixtures of experts of transformers as one operator, through its public ``ExpertsInterface``.

While :func:`fused_experts` is active, every experts module of a model whose weights have the
layout of ``hal::MixtureOfExperts`` calls it; other layouts keep transformers' grouped matmul.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers.integrations import moe

from hal.frontends import torch_ops

_NAME = "hal"


def _activation(module: Any) -> str | None:
    """Our name of the module's activation, found by comparing functions on a few numbers."""
    x = torch.linspace(-3, 3, 13)
    try:
        y = module.act_fn(x)
    except Exception:  # noqa: BLE001  an activation that is no plain elementwise function
        return None
    for name, ours in torch_ops._ACTIVATIONS.items():
        if torch.allclose(y, ours(x), atol=1e-6):
            return name
    return None


def _has_our_layout(module: Any) -> bool:
    return (
        module.has_gate
        and module.is_concatenated
        and not (module.is_transposed or module.has_bias or module.has_post_expert_norm)
        and not module._is_expert_parallel
        and type(module)._apply_gate is moe._default_apply_gate
    )


def _experts_forward(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    activation = self._hal_activation if _has_our_layout(self) else None
    if activation is None:
        y = moe.grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    else:
        weights = self.gate_up_proj, self.down_proj
        y = torch.ops.hal.mixture_of_experts(
            hidden_states, top_k_index, top_k_weights, *weights, activation
        )
    assert isinstance(y, torch.Tensor)
    return y


moe.ALL_EXPERTS_FUNCTIONS.register(_NAME, _experts_forward)


@contextlib.contextmanager
def fused_experts(model: transformers.PreTrainedModel) -> Iterator[None]:
    """Let ``model``'s experts use our operator inside the block; restores what was set before."""
    before = model.get_experts_implementation()
    experts = [m for m in model.modules() if hasattr(m, "_apply_gate")]
    for module in experts:
        module._hal_activation = _activation(module)
    model.set_experts_implementation(_NAME)
    try:
        yield
    finally:
        model.set_experts_implementation(before)
        for module in experts:
            del module._hal_activation
