"""How far a graph's results are from the float graph's, on the samples that it was given."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hal.errors import CheckFailed
from hal.ir import Graph
from hal.ir.evaluate import Evaluator
from hal.passes.quantize.calibration import Sample
from hal.runtime.scoring import log_softmax

LOGITS = "logits"
_KEPT_BYTES = 256 << 20
"""Float results that are kept to compare with, in files."""

_POSITIONS = 4096
"""Positions of a language model that figures are means of."""

_AT_ONCE = 1 << 21
"""Logits that are brought to float64 together."""

PROBE_POSITIONS = 512
"""Positions that are enough to tell layers apart."""


class Judge:
    """Compares with the float graph: its results are computed once and kept.

    Of a language model's samples 4,096 positions are used, or as many as fit in 256 MiB of logits.
    """

    def __init__(self, graph: Graph, samples: Sequence[Sample]) -> None:
        """Run ``graph`` on ``samples`` (state included)."""
        self._float = graph
        self._evaluator: Evaluator | None = None
        self._name = self._output(graph)
        self._language = graph.metadata.get("task") == "causal-lm" and self._name == LOGITS
        self._tokens = graph.signature().inputs[0].name
        self.samples: list[Sample] = []
        self._right: list[np.ndarray] = []  # mapped files
        self._folder = tempfile.TemporaryDirectory(prefix="hal-judge-")
        size = positions = 0
        run = Evaluator(graph, [self._name])
        for sample in samples:
            for part in self._rows(graph, sample):
                if self._language and positions >= _POSITIONS:
                    return
                positions += part[self._tokens].size
                result = run(part)[self._name]
                size += result.nbytes
                if self._right and size > _KEPT_BYTES:
                    return
                self.samples.append(part)
                path = Path(self._folder.name) / f"{len(self._right)}.npy"
                np.save(path, np.asarray(result, np.float32))
                self._right.append(np.load(path, mmap_mode="r"))
                del result  # logits are hundreds of megabytes: not two at a time

    def _output(self, graph: Graph) -> str:
        names = [spec.name for spec in graph.signature().outputs]
        return LOGITS if LOGITS in names else names[0]

    def _rows(self, graph: Graph, sample: Sample) -> list[Sample]:
        """A language model's sample row by row, others whole."""
        if not self._language:
            return [sample]
        count = len(sample[self._tokens])
        carried = {state.input: state for state in graph.state}
        return [
            {
                name: array
                if name in carried and "batch" not in carried[name].axes
                else array[i : i + 1]
                for name, array in sample.items()
            }
            for i in range(count)
        ]

    def weights(
        self, changed: Mapping[str, np.ndarray], *, probe: bool = False
    ) -> dict[str, float]:
        """Figures of the float graph with some weights replaced; ``probe``: on a few samples."""
        limit = None
        if probe and self._language:
            limit = max(1, PROBE_POSITIONS // self.samples[0][self._tokens].size)
        if self._evaluator is None:  # it holds memory that other work can use until now
            self._evaluator = Evaluator(self._float, [self._name])
        evaluator = self._evaluator
        return self._figures(lambda i: evaluator(self.samples[i], changed)[self._name], limit)

    def graph(self, graph: Graph, *, strict: bool = False) -> dict[str, float]:
        """Figures of another graph: ``kl``, ``top1``, ``ppl``, ``cosine``, as far as they apply.

        Raises:
            CheckFailed: it is to be ``strict``, and results are no numbers where the float graph's
                are.
        """
        run = Evaluator(graph, [self._name])
        return self._figures(lambda i: run(self.samples[i])[self._name], None, strict=strict)

    def _figures(
        self, run: Callable[[int], Any], limit: int | None, *, strict: bool = False
    ) -> dict[str, float]:
        """Means over samples, whose results ``run`` gives by number."""
        totals: dict[str, float] = {}
        count = 0
        pairs = list(zip(self.samples, self._right, strict=True))[:limit]
        for index, (sample, right) in enumerate(pairs):
            found = np.asarray(run(index), np.float32)
            ids = np.asarray(sample[self._tokens])[0] if self._language else None
            if strict and np.isfinite(right).all() and not np.isfinite(found).all():
                raise CheckFailed(
                    "the quantized model gives NaN or infinities where the float model does not",
                    "take another method or format; the calibration data may be what misleads it",
                )
            rows = _text(right, found, ids) if ids is not None else _outputs(right, found)
            for name, value in rows.items():
                totals[name] = totals.get(name, 0.0) + value
            count += 1
            del found
        means = {name: value / count for name, value in totals.items()}
        if "ppl" in means:
            means["ppl"] = float(np.exp(means["ppl"]))
        return means


def _text(right: np.ndarray, found: np.ndarray, ids: np.ndarray) -> dict[str, float]:
    """Means over positions; ``ppl`` is the logarithm of the ratio."""
    count, size = len(ids), right.shape[-1]
    right, found = right.reshape(count, size), found.reshape(count, size)
    kl = same = ratio = across = left = other = 0.0
    step = max(1, _AT_ONCE // size)
    for start in range(0, count, step):
        a, b = (x[start : start + step].astype(np.float64) for x in (right, found))
        across, left = across + float(np.vdot(a, b)), left + float(np.vdot(a, a))
        other += float(np.vdot(b, b))
        same += float(np.count_nonzero(a.argmax(-1) == b.argmax(-1)))
        p, q = log_softmax(a), log_softmax(b)
        nexts = ids[start + 1 : start + 1 + len(p)]
        places = np.arange(len(nexts)), nexts
        ratio += float(np.sum(p[places] - q[places]))
        kl += float(np.sum(np.exp(p) * (p - q)))
    norms = float(np.sqrt(left * other))
    figures = {"kl": kl / count, "top1": same / count, "cosine": 1.0 if left == other else 0.0}
    if norms:
        figures["cosine"] = across / norms
    return figures | ({"ppl": ratio / (count - 1)} if count > 1 else {})


def _outputs(right: np.ndarray, found: np.ndarray) -> dict[str, float]:
    figures = {"cosine": _cosine(right, found)}
    if right.ndim == 2 and right.shape[1] > 1:
        figures["top1"] = float(np.mean(right.argmax(-1) == found.argmax(-1)))
    return figures


def _cosine(right: np.ndarray, found: np.ndarray) -> float:
    """Mean over the first axis of the cosine between flattened rows."""
    a = right.reshape(len(right), -1).astype(np.float64)
    b = found.reshape(len(found), -1).astype(np.float64)
    size = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    alike = (np.square(a).sum(1) == np.square(b).sum(1)).astype(np.float64)  # both zero, or one
    return float(np.mean(np.where(size > 0, (a * b).sum(1) / np.where(size > 0, size, 1), alike)))
