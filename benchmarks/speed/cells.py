"""What is measured: groups of contenders that take turns, and the cells that each group fills."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from speed.artifacts import Artifact

Family = Literal["hal", "peer", "machine"]


@dataclasses.dataclass(frozen=True)
class Contender:
    """Who takes part.

    Attributes:
        name: as tables have it.
        family: ``machine`` measures a limit, beside the others and in the same rounds.
        environment, script: of its process; see :mod:`speed.venvs` and ``workers/``.
        artifact: what it loads.
        options: of the script, besides.
        files: more options, which are paths.
        lacking: why it cannot take part at all; then nothing is started.
        note: told below the table.
    """

    name: str
    family: Family
    environment: str = ""
    script: str = ""
    artifact: Artifact | None = None
    options: tuple[tuple[str, Any], ...] = ()
    files: tuple[tuple[str, Artifact], ...] = ()
    lacking: str = ""
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Measure:
    """One command, and how its answer becomes a figure.

    Attributes:
        key: last part of the cell's name.
        request: for the contender's process; ``machine`` contenders get :attr:`limit` instead.
        unit: ``tok/s``, ``ms`` (median of calls) or a rate.
        first: sent once before the rounds.
    """

    key: str
    title: str
    request: tuple[tuple[str, Any], ...]
    unit: str
    first: tuple[tuple[str, Any], ...] = ()
    limit: str = ""

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger figure is faster."""
        return self.unit not in ("ms", "s", "MB")


@dataclasses.dataclass(frozen=True)
class Group:
    """Contenders that are loaded together and take turns in all measures.

    Attributes:
        key: first parts of the names of its cells.
        part: what ``--only`` calls it.
        facts: for the judgement: bytes that a token must read, and so on.
        cold: every sample is a process of its own, from its start to its first token.
    """

    key: str
    part: str
    title: str
    contenders: tuple[Contender, ...]
    measures: tuple[Measure, ...]
    facts: tuple[tuple[str, Any], ...] = ()
    cold: bool = False

    def only(self, text: str) -> Group:
        """The group with those measures whose cells have a text in their names.

        Those of a cold group are of one process and stay together.
        """
        kept = [measure for measure in self.measures if text in self.cell(measure)]
        return dataclasses.replace(self, measures=self.measures if self.cold and kept else (*kept,))

    def cell(self, measure: Measure) -> str:
        """The name of a cell."""
        return f"{self.key}/{measure.key}"
