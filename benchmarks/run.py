"""hal beside other runtimes, in turns: language models, convolutions, kernels, compiling.

::

    python benchmarks/run.py                          # everything; hours on a small machine
    python benchmarks/run.py --only cnn --rounds 5
    python benchmarks/run.py --quick                  # next to no weights: does it all run?
    python benchmarks/run.py --prepare                # models and environments, no measurement
    python benchmarks/run.py --resume                 # go on where a run was stopped

Peers get virtual environments of their own with pinned versions, models are made from their
configurations with seeded random weights; both are kept under ``--cache``. Every contender is a
process that loads once and is stopped while others have their turn. Samples during which other
programs took much of the processors are taken again. Results go to
``benchmarks/results/speed.json`` after every cell, and from there to ``benchmarks/RESULTS.md``.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from speed import extras, machine, report
from speed.artifacts import Artifacts
from speed.contenders import groups
from speed.measure import Bench, Plan, Say
from speed.store import Store
from speed.venvs import Environments

HERE = Path(__file__).resolve().parent
PARTS = ("llm", "cnn", "kernels", "compile")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code: 130 when it was interrupted."""
    options = parser().parse_args(arguments)
    console = Console()
    # However it is told to end, contenders' processes, which are stopped, must end as well.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    quick = options.cache / "speed-quick.json"
    results = options.json or (quick if options.quick else HERE / "results" / "speed.json")
    beside = options.quick or options.json
    pages = options.report or (results.with_suffix(".md") if beside else HERE / "RESULTS.md")
    store = Store(results, options.resume or options.report_only)
    try:
        if not options.report_only:
            measure(options, store, console)
    except KeyboardInterrupt:
        console.print("interrupted; what is complete is kept: go on with --resume")
        return 130
    finally:
        if store.data["cells"]:
            report.write(store.data, pages, results.name)
            console.print(f"{results}\n{pages}")
    return 0


def measure(options: argparse.Namespace, store: Store, console: Console) -> None:
    """Everything that was asked for and is not done."""
    with _progress(console) as (say, count):
        environments = Environments(
            options.venvs or options.cache / "venvs", say, options.torch_index
        )
        artifacts = Artifacts(
            options.cache / "models", environments, say, keep=options.keep_bundles
        )
        rounds = options.rounds or (1 if options.quick else 7)
        wait = 0.0 if options.quick else options.wait
        plan = Plan(rounds, options.threads, say, wait, options.tries)
        bench = Bench(plan, environments, artifacts, store)
        chosen = [
            group.only(options.cells)
            for group in groups(options.quick)
            if group.part in options.only and group.only(options.cells).measures
        ]
        if options.prepare:
            count(len(chosen))
            for group in chosen:
                bench.prepare(group)
                count(-1)
            return
        _note_machine(store, environments, plan, quick=options.quick)
        kinds = [part for part in ("kernels", "compile") if part in options.only]
        count(len(chosen) + len(kinds) + 1)
        for group in chosen:
            bench.run(group)
            count(-1)
        extras.profiles(store, chosen, artifacts, options.threads, say)
        count(-1)
        for kind in kinds:
            extras.script(store, kind, quick=options.quick, threads=options.threads, say=say)
            count(-1)


def _note_machine(store: Store, environments: Environments, plan: Plan, *, quick: bool) -> None:
    """What it runs on, and with which versions: at first, so that a stopped run has it too."""
    facts = machine.facts(plan.threads)
    facts |= {"versions": environments.versions(), "rounds": plan.rounds, "quick": quick}
    store.fact("machine", {**facts, "date": time.strftime("%Y-%m-%d %H:%M")})


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    made.add_argument(
        "--only", type=lambda text: text.split(","), default=list(PARTS),
        help=f"some of {','.join(PARTS)}",
    )  # fmt: skip
    made.add_argument("--cells", default="", help="only cells with this text in their names")
    made.add_argument("--rounds", type=int, help="samples of each contender [7]")
    made.add_argument("--wait", type=float, default=6.0, help="seconds to wait for quiet [6]")
    made.add_argument("--tries", type=int, default=3, help="of a sample that others disturb [3]")
    made.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    made.add_argument("--quick", action="store_true", help="tiny models, one round")
    made.add_argument("--prepare", action="store_true", help="make models, measure nothing")
    made.add_argument("--resume", action="store_true", help="leave out cells that are complete")
    made.add_argument(
        "--keep-bundles", action="store_true", help="use bundles of hal's earlier code as well"
    )
    made.add_argument("--report-only", action="store_true", help="write the report anew")
    made.add_argument("--cache", type=Path, default=HERE / ".cache", help="models, environments")
    made.add_argument("--venvs", type=Path, help="environments of peers [CACHE/venvs]")
    made.add_argument("--torch-index", help="where pip looks for torch besides its indexes")
    made.add_argument("--json", type=Path, help="where results go")
    made.add_argument("--report", type=Path, help="where the report goes")
    return made


@contextmanager
def _progress(console: Console) -> Iterator[tuple[Say, _Count]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as shown:
        task = shown.add_task("")

        def say(text: str) -> None:
            shown.update(task, description=text)
            if not console.is_terminal:
                console.print(f"{time.strftime('%H:%M:%S')} {text}")

        yield say, _Count(shown, task)


class _Count:
    """Called with a number of things to do; with -1 when one of them is done."""

    def __init__(self, shown: Progress, task: object) -> None:
        self._shown, self._task = shown, task

    def __call__(self, number: int) -> None:
        if number < 0:
            self._shown.advance(self._task, -number)  # type: ignore[arg-type]
        else:
            self._shown.update(self._task, total=number)  # type: ignore[arg-type]


if __name__ == "__main__":
    raise SystemExit(main())
