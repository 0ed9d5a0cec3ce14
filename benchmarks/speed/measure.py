"""Rounds in turns, spoiled samples, and what becomes of a contender that fails."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from speed.artifacts import Artifacts
from speed.cells import Contender, Group, Measure
from speed.failures import Unavailable
from speed.seats import Seats
from speed.store import Store
from speed.venvs import Environments
from speed.worker import Worker
from speed.workers.protocol import foreign_share, machine_ticks, own_seconds

SPOILED = 0.08
"""A sample counts as spoiled if others took more of the processors' time meanwhile."""
_LOOK = 0.3
_COLD_PAUSE = 0.5

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is measured.

    ``say`` is told what goes on; ``wait``: seconds that a sample waits for others to be quiet;
    ``tries`` of a sample that others disturb.
    """

    rounds: int
    threads: int
    say: Say
    wait: float = 6.0
    tries: int = 3


class Bench:
    """Runs groups and stores each cell when it is complete."""

    def __init__(
        self, plan: Plan, environments: Environments, artifacts: Artifacts, store: Store
    ) -> None:
        self._plan, self._store = plan, store
        self._environments, self._artifacts = environments, artifacts

    def run(self, group: Group) -> None:
        """Measure those cells of a group that are not done yet."""
        left = [m for m in group.measures if not self._store.done(group.cell(m))]
        if not left:
            return
        if group.cold:
            self._cold(group)
            return
        with Seats(self._start) as seats:
            seats.load(group.contenders, lambda text: self._plan.say(f"{group.title}: {text}"))
            for measure in left:
                self._store.put(group, measure, self._rounds(group, measure, seats))

    def prepare(self, group: Group) -> None:
        """Make what a group's contenders load; what fails is told, and tried again in a run."""
        for contender in group.contenders:
            files = [artifact for _, artifact in contender.files]
            for artifact in [*files, *([contender.artifact] if contender.artifact else [])]:
                try:
                    self._artifacts.path(artifact)
                except Unavailable as error:
                    self._plan.say(f"{contender.name}: {error}")

    def _start(self, contender: Contender) -> Worker:
        """A process that has loaded.

        Raises:
            Unavailable: it cannot; says why.
        """
        if contender.lacking:
            raise Unavailable(contender.lacking)
        options: dict[str, Any] = {**dict(contender.options), "threads": self._plan.threads}
        if contender.artifact is not None:
            options["artifact"] = str(self._artifacts.path(contender.artifact))
        for name, artifact in contender.files:
            options[name] = str(self._artifacts.path(artifact))
        return Worker(self._environments.python(contender.environment), contender.script, options)

    def _rounds(self, group: Group, measure: Measure, seats: Seats) -> list[dict[str, Any]]:
        """Rows of a cell: a round to warm up, and those that count."""
        samples: dict[str, list[dict[str, Any]]] = {c.name: [] for c in group.contenders}
        failed = dict(seats.failed)
        who = [c for c in group.contenders if _takes_part(c, measure)]
        for turn in range(-1, self._plan.rounds):
            for contender in reversed(who) if turn % 2 else who:
                if contender.name in failed:
                    continue
                round_ = f"round {turn + 1} of {self._plan.rounds}" if turn >= 0 else "warm-up"
                self._plan.say(f"{group.title}, {measure.title}: {contender.name}, {round_}")
                try:
                    samples[contender.name] += self._turn(contender, measure, seats, turn)
                except Unavailable as error:
                    failed[contender.name] = str(error)
        return [
            _row(c, samples[c.name], failed.get(c.name, ""), seats.load_seconds.get(c.name))
            for c in who
        ]

    def _turn(
        self, contender: Contender, measure: Measure, seats: Seats, turn: int
    ) -> list[dict[str, Any]]:
        """What one turn gives: nothing if it is the one to warm up.

        Raises:
            Unavailable: the contender failed.
        """
        with seats.turn(contender) as (worker, new):
            if (turn < 0 or new) and measure.first and contender.family != "machine":
                worker.ask(dict(measure.first))
            if turn < 0 or new:
                self._sample(worker, contender, measure, 0, again=False)
            if turn < 0:
                return []
            return self._sample(worker, contender, measure, turn, again=True)

    def _sample(
        self, worker: Worker, contender: Contender, measure: Measure, turn: int, *, again: bool
    ) -> list[dict[str, Any]]:
        """One sample of a turn, the last of several if others disturbed those before.

        Raises:
            Unavailable: the contender failed.
        """
        request = dict(measure.request)
        if contender.family == "machine" and measure.limit:
            request = {"do": measure.limit, "runs": 3}
        if "seed" in request:
            request["seed"] = turn
        found: list[dict[str, Any]] = []
        for _ in range(self._plan.tries if again else 1):
            wait_until_quiet(self._plan.wait)
            answer = worker.ask(request)
            found.append(sample(answer, request, measure))
            if not found[-1]["spoiled"]:
                return found[-1:]
        return [min(found, key=lambda each: each["foreign"] or 0.0)]

    def _cold(self, group: Group) -> None:
        """Fill all cells of a cold group: each sample is a new process."""
        rows: dict[str, list[dict[str, Any]]] = {m.key: [] for m in group.measures}
        samples: dict[tuple[str, str], list[dict[str, Any]]] = {}
        failed: dict[str, str] = {}
        for turn in range(self._plan.rounds):
            for contender in group.contenders:
                if contender.name in failed:
                    continue
                self._plan.say(f"{group.title}: {contender.name}, round {turn + 1}")
                try:
                    for key, found in self._cold_sample(contender, group.measures):
                        samples.setdefault((contender.name, key), []).append(found)
                except Unavailable as error:
                    failed[contender.name] = str(error)
        for measure in group.measures:
            for contender in group.contenders:
                kept = samples.get((contender.name, measure.key), [])
                rows[measure.key].append(_row(contender, kept, failed.get(contender.name, "")))
            self._store.put(group, measure, rows[measure.key])

    def _cold_sample(
        self, contender: Contender, measures: Sequence[Measure]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        wait_until_quiet(self._plan.wait)
        before, parent = machine_ticks(), own_seconds()
        with self._start(contender) as worker:
            first, memory = measures
            answer = worker.ask(dict(first.request))
            wall = time.perf_counter() - worker.started
            after = machine_ticks()
            own = answer["cpu_seconds"] + own_seconds() - parent
            foreign = foreign_share(before, after, own)
            yield first.key, {
                "value": wall, "foreign": foreign,
                "spoiled": bool(foreign and foreign > SPOILED),
                "import_seconds": worker.facts["import_seconds"],
                "load_seconds": worker.facts["load_seconds"],
                "first_seconds": answer["seconds"][0],
            }  # fmt: skip
            after_decoding = worker.ask(dict(memory.request))["memory"]
            mb = {key: value / 1e6 for key, value in after_decoding.items()}
            libraries = worker.facts["memory_before"]
            yield memory.key, {
                "value": mb["peak"], "foreign": None, "spoiled": False,
                "own": mb["own"], "mapped": mb["mapped"],
                "libraries": (libraries["own"] + libraries["mapped"]) / 1e6,
                "weights_bytes": worker.facts.get("weights_bytes"),
            }  # fmt: skip
        time.sleep(_COLD_PAUSE)


def _takes_part(contender: Contender, measure: Measure) -> bool:
    """A machine's limit stands only beside measures that have one, or in its own group."""
    return contender.family != "machine" or bool(measure.limit) or measure.unit not in ("tok/s",)


def sample(answer: dict[str, Any], request: dict[str, Any], measure: Measure) -> dict[str, Any]:
    """A figure from an answer's times, and whether others spoiled it."""
    seconds, do = answer["seconds"], request["do"]
    if "rates" in answer:
        value = statistics.median(answer["rates"])
    elif do == "calls":
        value = 1e3 * statistics.median(seconds)
    else:
        value = request["tokens"] / sum(seconds)
    foreign = answer.get("foreign")
    found: dict[str, Any] = {
        "value": value, "foreign": foreign, "spoiled": bool(foreign and foreign > SPOILED)
    }  # fmt: skip
    if answer.get("tokens") and request.get("seed") == 0:
        found["tokens"] = answer["tokens"][:16]
    return found


def wait_until_quiet(limit: float) -> bool:
    """Wait for others to leave the processors alone, not longer than ``limit`` seconds."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        before = machine_ticks()
        time.sleep(_LOOK)
        share = foreign_share(before, machine_ticks(), 0.0)
        if share is None or share <= SPOILED:
            return True
    return False


def _row(
    contender: Contender,
    samples: list[dict[str, Any]],
    error: str,
    load_seconds: float | None = None,
) -> dict[str, Any]:
    row: dict[str, Any] = {"name": contender.name, "family": contender.family}
    if contender.note:
        row["note"] = contender.note
    if error:
        row["error"] = error
    if load_seconds is not None:
        row["load_seconds"] = load_seconds
    return {**row, "samples": samples}
