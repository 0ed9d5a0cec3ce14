"""What a pass is, and how passes are run one after the other.

::

    graph, reports = Pipeline("tidy", (Fold(), CommonSubexpressions(), DeadCode())).run(graph)
    for report in reports:
        print(report)

A pass is a small frozen dataclass with a name, real fields as options, and a docstring whose first
paragraph says what it does and whose second says what it preserves. It edits the clone that the
pipeline hands it; the caller's graph is never changed. After every pass the IR verifier runs, so a
broken graph is reported with the pass that broke it.
"""

from __future__ import annotations

import abc
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from hal.errors import GraphError, UnsupportedError
from hal.ir import Graph, verify


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one run of a pass did: how many places it changed, and facts worth showing."""

    matches: int
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Pass(abc.ABC):
    """One rewrite of a graph. Subclasses are frozen dataclasses; their fields are the options."""

    name: ClassVar[str]

    @abc.abstractmethod
    def run(self, graph: Graph) -> Outcome:
        """Edit ``graph`` in place, say what was changed. Tensors are shared: never write them."""

    def __str__(self) -> str:
        """The pass as text: its name, and its options where they differ from the defaults."""
        changed = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
            if getattr(self, field.name) != field.default
        ]
        return f"{self.name}({', '.join(changed)})" if changed else self.name

    def summary(self) -> str:
        """First line of the docstring."""
        return (self.__doc__ or "").strip().split("\n")[0]


@dataclasses.dataclass(frozen=True)
class PassReport:
    """Effect of one pass: places changed, nodes and weight bytes before and after, seconds."""

    name: str
    matches: int
    nodes_before: int
    nodes_after: int
    bytes_before: int
    bytes_after: int
    seconds: float
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """One line for ``--explain``."""
        text = (
            f"{self.name}: {self.matches} changes, {self.nodes_before} -> {self.nodes_after} nodes"
        )
        if self.bytes_before != self.bytes_after:
            text += f", {self.bytes_before} -> {self.bytes_after} weight bytes"
        if self.details:
            text += " (" + ", ".join(f"{k} {v}" for k, v in self.details.items()) + ")"
        return text


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A named list of passes and pipelines, run in order; a value that prints and compares.

    ``repeat`` runs the list again while it still changes something, at most that many times.
    """

    name: str
    steps: tuple[Pass | Pipeline, ...]
    repeat: int = 1

    def passes(self) -> Iterator[Pass]:
        """The passes in order, nested pipelines flattened (repetition not unrolled)."""
        for step in self.steps:
            if isinstance(step, Pipeline):
                yield from step.passes()
            else:
                yield step

    def __str__(self) -> str:
        """One line per pass, indented by nesting, so that two pipelines can be diffed as text."""
        head = f"{self.name} (up to {self.repeat} times)" if self.repeat > 1 else self.name
        lines = [line for step in self.steps for line in str(step).split("\n")]
        return "\n".join([f"{head}:", *(f"  {line}" for line in lines)])

    def run(
        self, graph: Graph, progress: Callable[[PassReport], None] | None = None
    ) -> tuple[Graph, list[PassReport]]:
        """Run on a clone of ``graph``; return the result and one report per pass run.

        Args:
            graph: left unchanged; its tensors are shared with the result.
            progress: called with each report as soon as its pass is done.

        Raises:
            GraphError: a pass left a graph that breaks the rules of the IR; the text names it and
                the pass before it.
        """
        work = graph.clone()
        reports: list[PassReport] = []
        self._run(work, reports, progress)
        return work, reports

    def _run(
        self,
        graph: Graph,
        reports: list[PassReport],
        progress: Callable[[PassReport], None] | None,
    ) -> None:
        for _ in range(self.repeat):
            start = len(reports)
            for step in self.steps:
                if isinstance(step, Pipeline):
                    step._run(graph, reports, progress)
                    continue
                before = reports[-1].name if reports else "the frontend"
                reports.append(_run_one(step, graph, before))
                if progress is not None:
                    progress(reports[-1])
            if not any(r.matches for r in reports[start:]):
                break


def _run_one(step: Pass, graph: Graph, before: str) -> PassReport:
    nodes, size, start = graph.node_count(), graph.weight_bytes(), time.perf_counter()
    outcome = step.run(graph)
    seconds = time.perf_counter() - start
    try:
        verify(graph)
    except (GraphError, UnsupportedError) as error:
        raise type(error)(
            f"after pass {step.name!r} (which followed {before!r}): {error.message}",
            "this is a defect of the pass; run without it and report the model",
        ) from error
    return PassReport(
        step.name,
        outcome.matches,
        nodes,
        graph.node_count(),
        size,
        graph.weight_bytes(),
        seconds,
        dict(outcome.details),
    )
