"""Sample inputs that methods look at, and what is kept of what a layer sees on them.

>>> calibration = Calibration.from_tokens(graph, tokens)     # [rows, length] token ids
>>> graph, reports = Pipeline("q", (Quantize(recipe, calibration=calibration),)).run(graph)
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from hal.errors import InputError
from hal.ir import Graph, TensorSpec

Sample = Mapping[str, np.ndarray]
"""Arrays by input name, state included."""

_TOKENS_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Inputs that stand for those that the model will see.

    Attributes:
        samples: one dictionary for each run; a run holds as many tokens or images as are worked on
            together.
        folder: where finished layers are kept, so that an interrupted run goes on where it was.
        spill_bytes: activations beyond this many bytes wait in a temporary file.
    """

    samples: Sequence[Sample]
    folder: Path | None = None
    spill_bytes: int = 32 << 20

    @classmethod
    def from_tokens(
        cls, graph: Graph, tokens: np.ndarray, *, folder: Path | None = None
    ) -> Calibration:
        """Samples for a language model from token ids ``[rows, length]``, nothing seen before.

        Raises:
            InputError: these are no token ids, or the graph takes other inputs besides.
        """
        array = np.asarray(tokens)
        if array.dtype.kind not in "iu" or array.ndim != 2 or not array.size:
            raise InputError(
                f"calibration tokens are {array.dtype}{list(array.shape)}",
                "give token ids as integers [rows, length]",
            )
        inputs = graph.signature().inputs
        if len(inputs) != 1 or inputs[0].dims is None or len(inputs[0].dims) != 2:
            raise InputError(
                "the model takes more than token ids: " + ", ".join(str(i) for i in inputs),
                "give a dictionary of arrays for each sample",
            )
        rows = max(1, _TOKENS_AT_ONCE // array.shape[1])
        samples = []
        for start in range(0, len(array), rows):
            part = np.ascontiguousarray(array[start : start + rows], np.dtype(inputs[0].dtype))
            samples.append({inputs[0].name: part, **_nothing_seen(graph, inputs[0], part)})
        return cls(samples, folder)

    def check(self, graph: Graph) -> None:
        """Compare the samples with what ``graph`` takes.

        Raises:
            InputError: there are none, or an array is missing, empty, of another dtype or shape,
                not finite, or no token of the vocabulary.
        """
        if not self.samples:
            raise InputError("the calibration data is empty", "give at least one sample")
        specs = graph.input_specs()
        for index, sample in enumerate(self.samples):
            for name in sample:
                if name not in specs:
                    raise InputError(
                        f"calibration sample {index}: the model has no input {name!r}",
                        "inputs: " + ", ".join(specs),
                    )
            for name, spec in specs.items():
                carried = any(state.input == name for state in graph.state)
                _check(index, spec, sample.get(name), carried)
        self._check_tokens(graph)

    def _check_tokens(self, graph: Graph) -> None:
        size = graph.metadata.get("vocab_size")
        name = graph.signature().inputs[0].name
        if graph.metadata.get("task") != "causal-lm" or not size:
            return
        for index, sample in enumerate(self.samples):
            ids = sample[name]
            if ids.dtype.kind in "iu" and (ids.min() < 0 or ids.max() >= size):
                raise InputError(
                    f"calibration sample {index}: {name!r} holds {ids.min()} to {ids.max()},"
                    f" the vocabulary has {size} tokens",
                    "encode the text with the model's own tokenizer",
                )

    def first(self, rows: int) -> Calibration:
        """As many samples as hold ``rows`` rows of their first input together, or all."""
        found, seen = [], 0
        for sample in self.samples:
            if seen >= rows:
                break
            found.append(sample)
            array = next(iter(sample.values()))
            seen += array.size if array.dtype.kind in "iu" else array.size // array.shape[-1]
        return dataclasses.replace(self, samples=found)

    def digest(self) -> str:
        """A name for the samples' content."""
        found = hashlib.sha256()
        for sample in self.samples:
            for name in sorted(sample):
                array = np.ascontiguousarray(sample[name])
                found.update(f"{name} {array.dtype} {array.shape}".encode())
                found.update(array.tobytes())
        return found.hexdigest()


def _check(index: int, spec: TensorSpec, array: np.ndarray | None, carried: bool) -> None:
    where = f"calibration sample {index}"
    if array is None:
        raise InputError(f"{where}: input {spec.name!r} is missing", f"the model takes {spec}")
    found = f"{array.dtype}[{', '.join(map(str, array.shape))}]"
    dims = spec.dims
    fits = dims is None or (
        len(dims) == array.ndim
        and all(d == n for d, n in zip(dims, array.shape, strict=True) if isinstance(d, int))
    )
    if array.dtype.name != spec.dtype or not fits:
        raise InputError(f"{where}: {spec.name!r} is {found}", f"the model takes {spec}")
    if not array.size and not carried:
        raise InputError(f"{where}: {spec.name!r} is empty ({found})", f"the model takes {spec}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError(
            f"{where}: {spec.name!r} holds infinities or NaN", "leave such samples out"
        )


def _nothing_seen(graph: Graph, tokens: TensorSpec, part: np.ndarray) -> dict[str, np.ndarray]:
    """State before the first token: zeros, of no length along the growth axis."""
    assert tokens.dims is not None
    known = dict(zip(tokens.dims, part.shape, strict=True))
    specs, made = graph.input_specs(), {}
    for state in graph.state:
        dims = specs[state.input].dims or ()
        extents = [
            0 if axis == state.growth_axis else (d if isinstance(d, int) else known.get(d, 0))
            for axis, d in enumerate(dims)
        ]
        made[state.input] = np.zeros(extents, np.dtype(specs[state.input].dtype))
    return made


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What a layer's input looked like, and what should be made up for; means over tokens.

    x is the input that the layer has once everything before it is quantized, x' the float model's.
    What the layer's result should be is ``W x' + r``, r being what the value lacks that it is added
    to. ``cross`` and ``lacking`` are taken from each half of the tokens, in sums over half of their
    number, so that the mean of both is that of all: what one half tells can be tried on the other.

    Attributes:
        gram: float32 ``[K, K]``, x xᵀ.
        cross: float32 ``[2, K, K]`` or None, (x' - x) xᵀ.
        lacking: float32 ``[2, N, K]`` or None, r xᵀ; with W (x' - x) xᵀ added if ``cross`` is None.
    """

    gram: np.ndarray
    cross: np.ndarray | None = None
    lacking: np.ndarray | None = None

    def with_white(self, part: float) -> Statistics:
        """The same plus ``part`` times inputs of equal size and no correlation; no correction."""
        size = np.float32(part * float(np.trace(self.gram)) / len(self.gram))
        return Statistics(self.gram + size * np.eye(len(self.gram), dtype=np.float32))


__all__ = ["Calibration", "Sample", "Statistics"]
