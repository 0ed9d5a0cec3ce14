"""Walk through a model segment by segment, with what has been quantized already quantized.

Each *stage* is one value that products with quantized weights read. The walk computes that value
for all samples from the few values that are live before it, takes the statistics, lets the caller
quantize the stage's layers, and goes on through the graph as it is then. So every node runs once
for each sample, and what is held is the live values between two stages: the residual stream and
the value itself. A second walk over the float graph, in step with the first, tells by how much
earlier rounding has moved the inputs.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from hal.errors import InputError
from hal.ir import Graph
from hal.ir.evaluate import Evaluator
from hal.ir.parts import ancestors, fixed_nodes, segment
from hal.ir.view import used_values
from hal.passes._edit import is_constant, is_op
from hal.passes.quantize.calibration import Calibration, Statistics
from hal.passes.quantize.experts import Routed, is_down
from hal.passes.quantize.layers import Layer

_CORRECTED = 8192
"""Tokens of the second walk. Corrections are damped and want fewer of them than Gram matrices."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A value, by name, and the layers whose products read it; for experts the routing as well."""

    values: tuple[str, ...]
    layers: tuple[Layer, ...]


def find_stages(graph: Graph, layers: Iterable[Layer]) -> list[Stage]:
    """Group layers by the input of their first product, in the order of the graph.

    A weight that is only looked up has no stage.
    """
    order = {node: i for i, node in enumerate(graph.graph)}
    groups: dict[tuple[ir.Value, ...], list[Layer]] = {}
    for layer in layers:
        values = inputs_of(layer)
        if values:
            groups.setdefault(values, []).append(layer)

    def position(values: tuple[ir.Value, ...]) -> int:
        makers = [value.producer() for value in values]
        return max(-1 if maker is None else order[maker] for maker in makers)

    return [
        Stage(tuple(v.name or "" for v in values), tuple(sorted(groups[values], key=_second)))
        for values in sorted(groups, key=position)
    ]


def _second(layer: Layer) -> bool:
    return layer.kind == "experts" and is_down(layer)


def inputs_of(layer: Layer) -> tuple[ir.Value, ...]:
    """The value that the layer's weight is multiplied with, if it is one of the main graph.

    For experts: their input, and which tokens choose whom. None for a matrix for each head, each of
    which sees inputs of its own.
    """
    if layer.stacked:
        return ()
    for node in layer.products:
        if node.graph is layer.weight.graph and node.inputs[0] is not None:
            return (node.inputs[0],)
    node = layer.uses[0]
    if layer.kind == "experts" and node.graph is layer.weight.graph:
        return tuple(v for v in node.inputs[:3] if v is not None)
    return ()


def looked_up(layer: Layer) -> bool:
    """Whether rows of the weight are picked by ``Gather``, whatever else is done with it."""
    return any(is_op(node, "Gather") for node in layer.uses)


def added_to(layer: Layer) -> str | None:
    """The value that the layer's result is added to (the residual stream), if there is one."""
    if len(layer.products) != 1:
        return None
    value = layer.products[0].outputs[0]
    for _ in range(2):
        uses = tuple(value.uses())
        if value.is_graph_output() or len(uses) != 1 or not is_op(uses[0].node, "Add"):
            return None
        node = uses[0].node
        other = node.inputs[1 - uses[0].idx]
        if other is not None and not is_constant(other):
            name: str | None = other.name
            return name
        value = node.outputs[0]
    return None


class Walk:
    """Values of all samples at one place of ``graph``, which moves forward.

    The graph may be edited between two moves, behind the place reached, as long as values keep
    their names.
    """

    def __init__(self, graph: Graph, calibration: Calibration, stages: list[Stage]) -> None:
        self._graph = graph
        self._folder = tempfile.TemporaryDirectory(prefix="hal-calibration-")
        self._store = _Store(Path(self._folder.name), calibration.spill_bytes)
        self.count = len(calibration.samples)
        self._live = {name for sample in calibration.samples for name in sample}
        for index, sample in enumerate(calibration.samples):
            for name, array in sample.items():
                self._store.put(index, name, array)
        self._todo = [stage.values for stage in stages]

    def close(self) -> None:
        """Forget everything."""
        self._store = _Store(Path(self._folder.name), 0)
        self._folder.cleanup()

    def has(self, name: str) -> bool:
        """Whether ``name`` is among the values held."""
        return name in self._live

    def value(self, sample: int, name: str) -> Any:
        """A value of one sample."""
        return self._store.get(sample, name)

    def divide(self, name: str, scale: np.ndarray) -> None:
        """Divide a value that is held by ``scale`` along its last axis, as the graph now does."""
        for index in range(self.count):
            value = self._store.get(index, name)
            self._store.put(index, name, (value / scale).astype(value.dtype))

    def reach(self, targets: tuple[str, ...]) -> None:
        """Compute all stages' values up to those of one stage."""
        while targets in self._todo:
            self._move()

    def _move(self) -> None:
        """Compute the next stage's values; drop what nothing later needs."""
        values = {v.name: v for v in _values(self._graph)}
        targets = [values[name] for name in self._todo[0]]
        later = {name for names in self._todo for name in names}
        self._todo = self._todo[1:]
        nodes = ancestors(targets, self._live)
        rest = set(ancestors([values[t] for t in later], self._live)) - set(nodes)
        # Made again where needed: a weight is larger than its codes.
        fixed = fixed_nodes(self._graph)
        needed = _read(rest) | later
        made = {v.name or "": v for n in nodes if n not in fixed for v in n.outputs}
        made = {name: value for name, value in made.items() if name in needed}
        if nodes:
            weights = _weights(self._graph, nodes, fixed)
            nodes = [node for node in nodes if node not in fixed]
            inputs = self._live | set(weights)
            run = Evaluator(segment(self._graph, nodes, inputs, list(made.values())))
            given = _read(nodes) & self._live
        for index in range(self.count):
            if nodes:
                feeds = {name: self._store.get(index, name) for name in given} | weights
                for name, value in run(feeds).items():
                    self._store.put(index, name, value)
            for name in self._live - needed:
                self._store.drop(index, name)
        self._live = {name for name in self._live | set(made) if name in needed}


def _read(nodes: Iterable[ir.Node]) -> set[str]:
    """Names of all values that nodes read."""
    return {v.name or "" for node in nodes for v in used_values(node)}


def _values(graph: Graph) -> Iterable[ir.Value]:
    yield from graph.graph.inputs
    for node in graph.graph:
        yield from node.outputs


def _weights(graph: Graph, nodes: list[ir.Node], fixed: set[ir.Node]) -> dict[str, Any]:
    """What the nodes among ``fixed`` compute for the others: dequantized weights, mostly."""
    inside = [node for node in nodes if node in fixed]
    made = {v for node in inside for v in node.outputs}
    wanted = dict.fromkeys(
        v for node in nodes if node not in fixed for v in used_values(node) if v in made
    )
    if not wanted:
        return {}
    return dict(Evaluator(segment(graph, inside, set(), list(wanted)))({}))


class _Store:
    """Values by sample and name; when memory for them is used up, in files."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._left = folder, limit
        self._kept: dict[tuple[int, str], Any] = {}
        self._count = 0

    def put(self, index: int, name: str, value: Any) -> None:
        self.drop(index, name)
        size = value.nbytes if isinstance(value, np.ndarray) else 0
        if isinstance(value, np.ndarray) and value.dtype.isbuiltin == 1 and size > self._left:
            path = self._folder / f"{self._count}.npy"
            self._count += 1
            np.save(path, value)
            self._kept[index, name] = path
            return
        self._left -= size
        self._kept[index, name] = value

    def get(self, index: int, name: str) -> Any:
        value = self._kept[index, name]
        return np.load(value) if isinstance(value, Path) else value

    def drop(self, index: int, name: str) -> None:
        value = self._kept.pop((index, name), None)
        if isinstance(value, Path):
            value.unlink()
        elif isinstance(value, np.ndarray):
            self._left += value.nbytes


@dataclasses.dataclass
class Streaming:
    """Both walks, of the graph that is being quantized and of the float one, stage by stage.

    ``correct`` asks for :attr:`Statistics.shift`; without it there is no second walk.
    """

    graph: Graph
    calibration: Calibration
    stages: list[Stage]
    correct: bool = True
    float_graph: Graph | None = None

    def run(self, visit: Callable[[Layer, Seen], None]) -> None:
        """Call ``visit`` for every layer, which quantizes it in ``graph``."""
        walk = Walk(self.graph, self.calibration, self.stages)
        other = None
        if self.correct:
            assert self.float_graph is not None
            samples = self.calibration
            if not any(layer.kind == "experts" for stage in self.stages for layer in stage.layers):
                samples = samples.first(_CORRECTED)  # experts see few of the tokens as it is
            other = Walk(self.float_graph, samples, self.stages)
        try:
            for stage in self.stages:
                seen = Seen(walk, other, stage.values, len(self.calibration.samples))
                for layer in stage.layers:
                    visit(layer, seen)
        finally:
            walk.close()
            if other is not None:
                other.close()


class Seen:
    """Statistics of one stage; layers that share their input share the Gram matrix."""

    def __init__(
        self, walk: Walk, other: Walk | None, values: tuple[str, ...], samples: int
    ) -> None:
        self._walk, self._other, self._values, self._samples = walk, other, values, samples
        self._grams: dict[int | None, np.ndarray] = {}
        self._cross: dict[int | None, np.ndarray] = {}

    def statistics(
        self, layer: Layer, weight: np.ndarray, rounding: int | None = None
    ) -> Statistics:
        """What ``layer`` with the float ``weight`` ``[N, K]`` sees.

        ``rounding`` is the length of the blocks in which its input will be rounded to 8 bits.
        """
        gram = self.gram(rounding)
        if self._other is None:
            return Statistics(gram)
        cross = None
        if len(weight) >= weight.shape[1]:
            if rounding not in self._cross:
                self._cross[rounding] = self._crossed(rounding)
            cross = self._cross[rounding]
        lacking = self._lacking(weight, rounding, added_to(layer), with_input=cross is None)
        return Statistics(gram, cross, lacking)

    def gram(self, rounding: int | None = None) -> np.ndarray:
        """The mean of x xᵀ, float32 ``[K, K]``.

        Raises:
            InputError: it exceeds float32.
        """
        self._reach()
        if rounding not in self._grams:
            self._grams[rounding] = self._measurable(self._gram(rounding))
        return self._grams[rounding]

    def _measurable(self, statistics: np.ndarray) -> np.ndarray:
        if not np.isfinite(statistics).all():
            raise InputError(
                f"the calibration data make the squares of {self._values[0]!r} exceed float32",
                "give data as the model sees it, or a method that needs none: rtn or hqq",
            )
        return statistics

    def sample(self, most: int) -> np.ndarray:
        """About ``most`` rows of the input, evenly from all samples, float32 ``[n, K]``."""
        self._reach()
        each = max(1, most // self._samples)
        found = []
        for index in range(self._samples):
            rows = self._rows(self._walk, index, None)
            found.append(rows[:: max(1, len(rows) // each)])
        rows = np.concatenate(found)
        with np.errstate(over="ignore"):
            self._measurable(np.square(rows).sum(0))
        return rows

    def divide(self, scale: np.ndarray) -> None:
        """Note that the graph was changed to make the stage's value smaller by ``scale``."""
        self._walk.divide(self._values[0], scale)
        self._grams.clear()

    def routed(self) -> Routed:
        """All tokens at a mixture of experts."""
        self._reach()
        x, index, share = (
            np.concatenate([np.asarray(self._walk.value(i, name)) for i in range(self._samples)])
            for name in self._values
        )
        x = x.astype(np.float32, copy=False)
        x_float = x
        if self._other is not None:
            there = [self._rows(self._other, i, None) for i in range(self._samples)]
            x_float = np.concatenate(there)
        return Routed(x, x_float, index, share.astype(np.float32, copy=False))

    def _reach(self) -> None:
        for walk in (self._walk, self._other):
            if walk is not None:
                walk.reach(self._values)

    def _rows(self, walk: Walk, index: int, group: int | None) -> np.ndarray:
        array = np.asarray(walk.value(index, self._values[0]), np.float32)
        rows = np.ascontiguousarray(array.reshape(-1, array.shape[-1]))
        return rows if group is None else round_activations(rows, group)

    def _gram(self, group: int | None) -> np.ndarray:
        total, tokens = np.float32(0), 0
        for index in range(self._samples):
            rows = self._rows(self._walk, index, group)
            with np.errstate(over="ignore"):
                total = _plus(total, rows.T @ rows)
            tokens += len(rows)
        return np.asarray(total / np.float32(max(tokens, 1)))

    def _crossed(self, group: int | None) -> np.ndarray:
        assert self._other is not None
        sums = _HalfSums()
        for index in range(self._other.count):
            rows = self._rows(self._walk, index, group)
            moved = self._rows(self._other, index, None) - rows
            sums.add(moved, rows, index if self._other.count > 1 else None)
        return sums.means()

    def _lacking(
        self, weight: np.ndarray, group: int | None, target: str | None, *, with_input: bool
    ) -> np.ndarray | None:
        assert self._other is not None
        if target is not None and not (self._walk.has(target) and self._other.has(target)):
            target = None
        if target is None and not with_input:
            return None
        sums = _HalfSums()
        for index in range(self._other.count):
            rows = self._rows(self._walk, index, group)
            lacking = np.zeros((len(rows), len(weight)), np.float32)
            if with_input:
                lacking = (self._rows(self._other, index, None) - rows) @ weight.T
            if target is not None:
                there = self._other.value(index, target) - self._walk.value(index, target)
                if there.size != lacking.size:  # the result is broadcast over what it is added to
                    return np.zeros((2, *weight.shape), np.float32) if with_input else None
                lacking += there.reshape(lacking.shape)
            sums.add(lacking, rows, index if self._other.count > 1 else None)
        return sums.means()


class _HalfSums:
    """Sums of products over halves of the tokens: every other sample, or half of a single one."""

    def __init__(self) -> None:
        self._sums: list[Any] = [np.float32(0), np.float32(0)]
        self._tokens = 0

    def add(self, left: np.ndarray, right: np.ndarray, sample: int | None) -> None:
        """Add ``leftᵀ right``, of ``[tokens, ...]``, to the sums; ``sample``: None if single."""
        middle = len(left) // 2
        halves = (slice(middle), slice(middle, None))
        for half, part in enumerate(halves) if sample is None else ((sample % 2, slice(None)),):
            self._sums[half] = _plus(self._sums[half], left[part].T @ right[part])
        self._tokens += len(left)

    def means(self) -> np.ndarray:
        """Both sums over half of the number of tokens, ``[2, ...]``."""
        return np.stack(self._sums) / np.float32(max(self._tokens, 1) / 2)


def _plus(total: Any, part: np.ndarray) -> Any:
    return part if np.ndim(total) == 0 else np.add(total, part, out=total)


def round_activations(rows: np.ndarray, group: int) -> np.ndarray:
    """What ``hal::RoundActivations`` does to float32 rows ``[n, K]``, in blocks of ``group``."""
    blocks = rows.reshape(-1, group or rows.shape[1])
    scale = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    safe = np.where(scale == 0, np.float32(1), scale)
    result: np.ndarray = (np.rint(blocks / safe) * scale).reshape(rows.shape)
    return result


__all__ = ["Seen", "Stage", "Streaming", "Walk", "added_to", "find_stages", "round_activations"]
