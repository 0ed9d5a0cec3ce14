"""A model with carried state as a step of static shapes: a fixed batch, chunk and capacity.

Three dims of such a model are free: how many sequences run together, how many tokens each call
takes, and how many positions the cache holds. :func:`free_dims` names them, a :class:`Step` has
their extents, and :func:`required` says which are still to be given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hal.errors import InputError, UnsupportedError, did_you_mean

if TYPE_CHECKING:
    from hal.ir.graph import Graph

STEP_KEY = "step"
"""Where the lowering leaves a graph's :class:`Step` in its metadata."""

BATCH, TOKENS, CAPACITY = (
    "sequences that run together",
    "tokens in a step",
    "positions that the cache holds, prompt and answer",
)
_USUAL = {BATCH: 1, TOKENS: 1, CAPACITY: 256}


@dataclasses.dataclass(frozen=True)
class Step:
    """Extents of a step: ``batch`` rows of ``tokens`` tokens, ``capacity`` positions of a row.

    ``capacity`` is 0 where no state grows.
    """

    batch: int
    tokens: int
    capacity: int

    @classmethod
    def of(cls, graph: Graph) -> Step | None:
        """What the lowering left in a graph."""
        data = graph.metadata.get(STEP_KEY)
        return None if data is None else cls(**data)

    def takes(self, graph: Graph, calls: Sequence[Mapping[str, Any]]) -> bool:
        """Whether calls in a row, inputs by name, have its batch and fit into its memory."""
        first = graph.signature().inputs[0].name
        shapes = [np.shape(call[first]) for call in calls]
        tokens = sum(shape[1] for shape in shapes)
        fits = not self.capacity or tokens <= self.capacity
        return fits and all(shape[0] == self.batch for shape in shapes)

    def to_json(self) -> dict[str, int]:
        """JSON-ready; ``Step(**data)`` is the inverse."""
        return dataclasses.asdict(self)

    def page(self, window: int) -> int:
        """Positions that a row's memory has where queries look back at ``window`` (0: at all).

        A chunk may begin at the last position and be padded; a window moves to the front of its
        memory when that is full.
        """
        whole = self.capacity + self.tokens - 1
        return min(whole, max(2 * window, window - 1 + self.tokens)) if window else whole


def free_dims(graph: Graph) -> dict[str, str]:
    """Dynamic dims of a graph's inputs by name, and what each means ("" where nobody knows).

    In the order in which inputs have them; those of carried state that follow from others are left
    out.
    """
    meanings = _meanings(graph)
    found = dict(meanings)
    for value in graph.graph.inputs:
        for dim in value.shape or ():
            if not isinstance(dim, int) and dim.value is not None:
                found.setdefault(str(dim.value), "")
    return found


def _meanings(graph: Graph) -> dict[str, str]:
    """Dims of a model with carried state."""
    carried = {s.input: s for s in graph.state}
    source = next((v for v in graph.graph.inputs if v.name not in carried), None)
    if not carried or source is None or source.shape is None:
        return {}
    found = {
        str(dim.value): meaning
        for dim, meaning in zip(source.shape, (BATCH, TOKENS), strict=False)
        if not isinstance(dim, int)
    }
    for value in graph.graph.inputs:
        state = carried.get(value.name or "")
        if state is not None and state.growth_axis is not None and value.shape is not None:
            found.setdefault(str(value.shape[state.growth_axis]), CAPACITY)
    return found


def required(graph: Graph, target: str) -> UnsupportedError:
    """The error of a target with static shapes; lists the dims to give, and as what option."""
    dims = free_dims(graph)
    names = [f"{name!r} ({meaning})" if meaning else repr(name) for name, meaning in dims.items()]
    most = graph.metadata.get("max_positions") or _USUAL[CAPACITY]
    options = {n: min(_USUAL.get(m, 1), most) for n, m in dims.items()}
    return UnsupportedError(
        f"target {target!r} takes static shapes only, and the model has the dynamic "
        f"{'dim' if len(dims) == 1 else 'dims'} {_listed(names)}",
        "give extents: " + " ".join(f"--dim {name}={extent}" for name, extent in options.items()),
    )


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def step_of(graph: Graph, extents: Mapping[str, int]) -> Step:
    """The step of a neutral graph with carried state, of extents by the names of its dims.

    Raises:
        InputError: a name is no dim of the graph, one is missing, or an extent is not positive.
    """
    dims = free_dims(graph)
    for name, extent in extents.items():
        if name not in dims:
            raise InputError(f"the model has no dynamic dim {name!r}", did_you_mean(name, dims))
        if extent < 1:
            raise InputError(f"dim {name!r} cannot have the extent {extent}", "give 1 or more")
    missing = [name for name in dims if name not in extents]
    if missing:
        options = " ".join(f"--dim {name}={_USUAL.get(dims[name], 1)}" for name in missing)
        raise InputError(
            f"a model with carried state has all its dims fixed or none, and "
            f"{_listed([f'{name!r} ({dims[name]})' for name in missing])} "
            f"{'has' if len(missing) == 1 else 'have'} no extent",
            f"give it too: {options}",
        )
    other = [name for name, meaning in dims.items() if not meaning]
    if other:
        raise InputError(
            f"the model carries state and has the further dynamic dim {other[0]!r}",
            "export it with that dim static",
        )
    found: dict[str, int] = {}
    for name, extent in extents.items():
        found[dims[name]] = min(extent, found.get(dims[name], extent))
    source = next(v for v in graph.graph.inputs if v.name not in {s.input for s in graph.state})
    for dim, meaning in zip(source.shape or (), (BATCH, TOKENS), strict=False):
        if isinstance(dim, int):
            found[meaning] = dim
    most = graph.metadata.get("max_positions")
    capacity = found.get(CAPACITY, 0)
    if most and capacity > most:
        raise InputError(
            f"a cache of {capacity} positions is asked for, the model has {most}",
            f"give at most {most}",
        )
    return Step(found[BATCH], found.get(TOKENS, 1), capacity)


def tokens_dim(graph: Graph) -> str:
    """Name of the dim of tokens of a model with carried state."""
    return next((n for n, meaning in _meanings(graph).items() if meaning == TOKENS), "sequence")


def sample_extents(graph: Graph, step: Step, tokens: int) -> dict[str, int]:
    """Extents of a first call of up to ``tokens`` tokens that leaves room for two steps of one."""
    length = max(1, min(tokens, step.capacity - 2)) if step.capacity else tokens
    extents = {BATCH: step.batch, TOKENS: length}
    return {n: extents[meaning] for n, meaning in _meanings(graph).items() if meaning in extents}
