"""What a model takes, gives and carries: plain data, which needs no graph and no ONNX library."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

Dim = int | str
"""A static extent, the name of a dynamic one, or an expression such as ``past + sequence``."""


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Name, dtype (numpy/ml_dtypes name, or ``string``) and dims of one input or output.

    ``dims`` is None when the rank is unknown; ``container`` is ``tensor``, ``sequence`` or
    ``optional`` (the last two only come from ONNX files).
    """

    name: str
    dtype: str
    dims: tuple[Dim, ...] | None
    container: str = "tensor"

    def __str__(self) -> str:
        dims = "?" if self.dims is None else ", ".join(str(d) for d in self.dims)
        text = f"{self.dtype}[{dims}]"
        return f"{self.name}: {text if self.container == 'tensor' else f'{self.container}({text})'}"


@dataclasses.dataclass(frozen=True)
class State:
    """A tensor carried from one call to the next, such as a KV cache.

    Its meaning never depends on how a target lays it out: ``axes`` labels what each axis is
    (``batch``, ``head``, ``position``, ``channel``), ``growth_axis`` is the axis along which each
    call appends (None for state of fixed size), ``kind`` says what is stored (``key``, ``value``,
    ``latent``, ``recurrent``, …). ``input`` and ``output`` are graph value names.
    """

    name: str
    input: str
    output: str
    kind: str
    axes: tuple[str, ...]
    growth_axis: int | None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary; inverse of :meth:`from_json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> State:
        """Build from :meth:`to_json`'s dictionary."""
        return cls(**{**data, "axes": tuple(data["axes"])})


@dataclasses.dataclass(frozen=True)
class Signature:
    """What a caller passes and gets, state excluded, and the state carried between calls."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    state: tuple[State, ...]
