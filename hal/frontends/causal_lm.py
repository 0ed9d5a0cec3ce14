"""Decoder language models of transformers as a module with an explicit cache.

What a model's cache holds is found by running it on small inputs and looking at what grows, so
there is nothing here about any architecture.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from typing import Any

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.cache_utils import DynamicLayer

from hal.errors import ExportError
from hal.ir import State


@dataclasses.dataclass(frozen=True)
class CacheTensor:
    """One tensor of the cache: where it lives, its shape, which axes are batch and position."""

    layer: int
    attribute: str
    shape: tuple[int, ...]
    batch_axis: int
    growth_axis: int
    dtype: torch.dtype

    @property
    def kind(self) -> str:
        """``keys`` → ``key``: what the cache itself calls it."""
        return self.attribute.removesuffix("s")

    def state(self) -> State:
        """The graph's state: ``past.0.key`` → ``present.0.key``."""
        names = ["channel"] * len(self.shape)
        names[self.batch_axis], names[self.growth_axis] = "batch", "position"
        for axis in range(self.batch_axis + 1, self.growth_axis):
            names[axis] = "head"
        name = f"{self.layer}.{self.kind}"
        return State(
            name, f"past.{name}", f"present.{name}", self.kind, tuple(names), self.growth_axis
        )

    def example(self, batch: int, length: int) -> torch.Tensor:
        """A tensor of ``length`` positions."""
        shape = list(self.shape)
        shape[self.batch_axis], shape[self.growth_axis] = batch, length
        return torch.zeros(shape, dtype=self.dtype)


class CausalLM(torch.nn.Module):
    """``forward(input_ids, past) -> (logits, *present)`` around a transformers model.

    ``past`` and ``present`` are the cache's tensors in the order of :attr:`layout`. Every layer
    keeps all positions; a sliding window is left to the attention mask, so the state's length
    always tells the position.
    """

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        # On fake tensors: shapes are enough, and no weight is read from disk for them.
        with FakeTensorMode(allow_non_fake_inputs=True):
            self._template = _full_length_cache(_run(model, 2, 3))
            self.layout = _layout(model, self._template)
        self._positioned = "position_ids" in inspect.signature(model.forward).parameters

    def forward(self, input_ids: torch.Tensor, past: list[torch.Tensor]) -> tuple[Any, ...]:
        """``input_ids`` int64 [batch, sequence], ``past`` one tensor per cache tensor."""
        cache = _copy(self._template)
        for item, tensor in zip(self.layout, past, strict=True):
            setattr(cache.layers[item.layer], item.attribute, tensor)
        positions = {"position_ids": self._positions(input_ids, past)} if self._positioned else {}
        out = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True, **positions)
        present = [getattr(cache.layers[i.layer], i.attribute) for i in self.layout]
        return (out.logits, *present)

    def _positions(self, input_ids: torch.Tensor, past: list[torch.Tensor]) -> torch.Tensor:
        """Positions for each row, so that a target may let rows differ in length."""
        start = past[0].shape[self.layout[0].growth_axis]
        batch, length = input_ids.shape
        return (torch.arange(length, device=input_ids.device) + start).expand(batch, length)


def _run(model: transformers.PreTrainedModel, batch: int, length: int, cache: Any = None) -> Any:
    """The cache after a forward pass on ``length`` tokens."""
    device = next(model.parameters()).device
    ids = torch.ones(batch, length, dtype=torch.int64, device=device)
    with torch.no_grad():
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
    cache = getattr(out, "past_key_values", None)
    if cache is None or not getattr(cache, "layers", None):
        raise ExportError(
            f"{type(model).__name__} returns no cache made of layers",
            "only models whose cache is a transformers Cache can generate step by step",
        )
    return cache


def _copy(cache: Any) -> Any:
    """A copy whose layers can be changed; tensors are shared."""
    cache = copy.copy(cache)
    cache.layers = [copy.copy(layer) for layer in cache.layers]
    return cache


def _full_length_cache(cache: Any) -> Any:
    """A copy whose bounded layers are replaced by ones that keep every position."""
    cache = _copy(cache)
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicLayer) and getattr(layer, "is_sliding", False):
            full = DynamicLayer()
            full.lazy_initialization(layer.keys, layer.values)
            full.keys, full.values = layer.keys, layer.values
            cache.layers[index] = full
    return cache


def _tensors(cache: Any) -> dict[tuple[int, str], torch.Tensor]:
    return {
        (index, name): value
        for index, layer in enumerate(cache.layers)
        for name, value in vars(layer).items()
        if isinstance(value, torch.Tensor) and value.ndim > 0
    }


def _layout(model: transformers.PreTrainedModel, template: Any) -> tuple[CacheTensor, ...]:
    """Which tensors the cache holds, by comparing runs of other batch and length."""
    base = {k: v.shape for k, v in _tensors(template).items()}
    wider = {k: v.shape for k, v in _tensors(_full_length_cache(_run(model, 3, 3))).items()}
    longer = {k: v.shape for k, v in _tensors(_run(model, 2, 2, _copy(template))).items()}
    found = []
    for (layer, attribute), shape in base.items():
        key = (layer, attribute)
        batch = [a for a, (x, y) in enumerate(zip(shape, wider[key], strict=True)) if x != y]
        growth = [a for a, (x, y) in enumerate(zip(shape, longer[key], strict=True)) if x != y]
        if len(batch) != 1 or len(growth) != 1 or longer[key][growth[0]] != shape[growth[0]] + 2:
            raise ExportError(
                f"{type(model).__name__}: {attribute!r} of cache layer {layer} does not grow by"
                " one position per token",
                "only caches that append along one axis are supported",
            )
        dtype = getattr(template.layers[layer], attribute).dtype
        found.append(CacheTensor(layer, attribute, tuple(shape), batch[0], growth[0], dtype))
    return tuple(found)
