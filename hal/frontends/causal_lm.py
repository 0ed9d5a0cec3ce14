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
from transformers.cache_utils import (
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
)

from hal.errors import ExportError
from hal.ir import State


@dataclasses.dataclass(frozen=True)
class CacheTensor:
    """One tensor of the cache: where it lives, its shape, which axes are batch and position.

    ``index`` is the place in a dictionary attribute, ``growth_axis`` None for a fixed size.
    """

    layer: int
    attribute: str
    index: int | None
    shape: tuple[int, ...]
    batch_axis: int
    growth_axis: int | None
    dtype: torch.dtype

    @property
    def kind(self) -> str:
        """``keys`` → ``key``, ``conv_states`` → ``conv``: what the cache itself calls it."""
        return self.attribute.removesuffix("s").removesuffix("_state")

    @property
    def axes(self) -> dict[int, str]:
        """Names of the axes whose size is known at run time only."""
        axes = {self.batch_axis: "batch"}
        return axes if self.growth_axis is None else {**axes, self.growth_axis: "past"}

    def state(self) -> State:
        """The graph's state: ``past.0.key`` → ``present.0.key``."""
        names = ["channel"] * len(self.shape)
        names[self.batch_axis] = "batch"
        if self.growth_axis is not None:
            names[self.growth_axis] = "position"
        for axis in range(self.batch_axis + 1, self.growth_axis or len(self.shape) - 2):
            names[axis] = "head"
        name = f"{self.layer}.{self.kind}" + (f".{self.index}" if self.index else "")
        return State(
            name, f"past.{name}", f"present.{name}", self.kind, tuple(names), self.growth_axis
        )

    def example(self, batch: int, length: int) -> torch.Tensor:
        """A tensor of ``length`` positions."""
        shape = list(self.shape)
        shape[self.batch_axis] = batch
        if self.growth_axis is not None:
            shape[self.growth_axis] = length
        return torch.zeros(shape, dtype=self.dtype)

    def read(self, cache: Any) -> torch.Tensor:
        """The tensor in ``cache``."""
        found = getattr(cache.layers[self.layer], self.attribute)
        tensor = found if self.index is None else found[self.index]
        assert isinstance(tensor, torch.Tensor)
        return tensor

    def write(self, cache: Any, tensor: torch.Tensor) -> None:
        """Put ``tensor`` into ``cache``, made by :func:`_copy`."""
        layer = cache.layers[self.layer]
        if self.growth_axis is None:
            tensor = tensor.clone()  # a tensor of fixed size may be updated in place
        if self.index is None:
            setattr(layer, self.attribute, tensor)
        else:
            getattr(layer, self.attribute)[self.index] = tensor


class CausalLM(torch.nn.Module):
    """``forward(input_ids, past) -> (logits, *present)`` around a transformers model.

    ``past`` and ``present`` are the cache's tensors in the order of :attr:`layout`. Every layer
    keeps all positions; a sliding window is left to the attention mask, so the state's length
    always tells the position. Tensors of fixed size start as zeros, which is what they stand for
    before the first token; so the flags that say whether there was one are always set.
    """

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        # On fake tensors: shapes are enough, and no weight is read from disk for them.
        with FakeTensorMode(allow_non_fake_inputs=True):
            self._template = _full_length_cache(_run(model, 2, 3))
            self.layout = _layout(model, self._template)
        self._growing = next((i for i, t in enumerate(self.layout) if t.growth_axis), None)
        self._positioned = "position_ids" in inspect.signature(model.forward).parameters

    def forward(self, input_ids: torch.Tensor, past: list[torch.Tensor]) -> tuple[Any, ...]:
        """``input_ids`` int64 [batch, sequence], ``past`` one tensor per cache tensor."""
        cache = _copy(self._template)
        for item, tensor in zip(self.layout, past, strict=True):
            item.write(cache, tensor)
        positions = self._positions(input_ids, past)
        carried = {_cache_name(self.model): cache}
        out = self.model(input_ids=input_ids, use_cache=True, **carried, **positions)
        return (out.logits, *(item.read(cache) for item in self.layout))

    def _positions(self, input_ids: torch.Tensor, past: list[torch.Tensor]) -> dict[str, Any]:
        """Positions for each row, so that a target may let rows differ in length.

        Nothing for a model that takes none, or whose cache does not tell them.
        """
        if not self._positioned or self._growing is None:
            return {}
        axis = self.layout[self._growing].growth_axis
        assert axis is not None
        start = past[self._growing].shape[axis]
        batch, length = input_ids.shape
        positions = torch.arange(length, device=input_ids.device) + start
        return {"position_ids": positions.expand(batch, length)}


def _cache_name(model: transformers.PreTrainedModel) -> str:
    """What ``forward`` calls the cache: models without attention have a name of their own."""
    parameters = inspect.signature(model.forward).parameters
    known = ("past_key_values", "cache_params")
    return next((name for name in known if name in parameters), known[0])


def _run(model: transformers.PreTrainedModel, batch: int, length: int, cache: Any = None) -> Any:
    """The cache after a forward pass on ``length`` tokens."""
    device = next(model.parameters()).device
    ids = torch.ones(batch, length, dtype=torch.int64, device=device)
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=True, **{_cache_name(model): cache})
    cache = getattr(out, _cache_name(model), None)
    if cache is None or not getattr(cache, "layers", None):
        raise ExportError(
            f"{type(model).__name__} returns no cache made of layers",
            "only models whose cache is a transformers Cache can generate step by step",
        )
    return cache


def _copy(cache: Any) -> Any:
    """A copy whose layers, and dictionaries in them, can be changed; tensors are shared."""
    cache = copy.copy(cache)
    cache.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in cache.layers:
        vars(layer).update({k: dict(v) for k, v in vars(layer).items() if isinstance(v, dict)})
    return cache


def _full_length_cache(cache: Any) -> Any:
    """A copy whose bounded layers are replaced by ones that keep every position."""
    cache = _copy(cache)
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicLayer) and getattr(layer, "is_sliding", False):
            recurrent = isinstance(layer, LinearAttentionCacheLayerMixin)
            full = LinearAttentionAndFullAttentionLayer() if recurrent else DynamicLayer()
            names = {*vars(full), "dtype", "device"}
            vars(full).update({k: v for k, v in vars(layer).items() if k in names})
            cache.layers[index] = full
    return cache


_Place = tuple[int, str, int | None]


def _tensors(cache: Any) -> dict[_Place, torch.Tensor]:
    """Tensors by layer, attribute, and place if the attribute is a dictionary of them."""
    found: dict[_Place, Any] = {}
    for index, layer in enumerate(cache.layers):
        for name, value in vars(layer).items():
            items = value.items() if isinstance(value, dict) else [(None, value)]
            found.update({(index, name, key): item for key, item in items})
    return {k: v for k, v in found.items() if isinstance(v, torch.Tensor) and v.ndim > 0}


def _layout(model: transformers.PreTrainedModel, template: Any) -> tuple[CacheTensor, ...]:
    """Which tensors the cache holds, by comparing runs of other batch and length."""
    base = {k: v.shape for k, v in _tensors(template).items()}
    wider = {k: v.shape for k, v in _tensors(_full_length_cache(_run(model, 3, 3))).items()}
    longer = {k: v.shape for k, v in _tensors(_run(model, 2, 2, _copy(template))).items()}
    found = []
    for key, shape in base.items():
        layer, attribute, index = key
        batch = [a for a, (x, y) in enumerate(zip(shape, wider[key], strict=True)) if x != y]
        growth = [a for a, (x, y) in enumerate(zip(shape, longer[key], strict=True)) if x != y]
        grows = len(growth) == 1 and longer[key][growth[0]] == shape[growth[0]] + 2
        if len(batch) != 1 or not (grows or not growth):
            raise ExportError(
                f"{type(model).__name__}: {attribute!r} of cache layer {layer} neither grows by"
                " one position per token nor keeps its size",
                "only caches that append along one axis, or have a fixed size, are supported",
            )
        dtype = _tensors(template)[key].dtype
        axis = growth[0] if growth else None
        found.append(CacheTensor(layer, attribute, index, tuple(shape), batch[0], axis, dtype))
    return tuple(found)
