"""``hal conformance``: a target against ONNX's test-suite, small models, or the ops of a model."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hal.cli._options import Json, check_page, parse_dims
from hal.cli._output import print_json, print_line, print_table
from hal.errors import CheckFailed

if TYPE_CHECKING:
    from hal.conformance import Outcome, Selection

EXAMPLE = "Example: hal conformance my-chip --op Conv,MatMul --html report.html"
_REASONS = 25


def conformance_command(
    target: Annotated[str, typer.Argument(metavar="TARGET[:ROUTE]", help="What is tried.")],
    op: Annotated[
        str | None, typer.Option("--op", metavar="OP,...", help="Only cases about these ops.")
    ] = None,
    models: Annotated[
        bool, typer.Option("--models", help="Small models of each family, instead of single ops.")
    ] = False,
    from_model: Annotated[
        str | None,
        typer.Option(
            "--from-model",
            metavar="MODEL",
            help="The ops of this bundle or model, as they are in it, instead.",
        ),
    ] = None,
    dim: Annotated[
        list[str] | None,
        typer.Option(
            "--dim",
            metavar="NAME=N",
            help="Extent of a dynamic dim of that model; default: what its stored inputs have, "
            "else 2 for batch, 5 for sequence, 3 for others; repeatable.",
        ),
    ] = None,
    host: Annotated[
        bool, typer.Option("--fallback", help="Let the host run what the target refuses.")
    ] = False,
    limit: Annotated[
        float, typer.Option("--limit", min=0.1, metavar="SECONDS", help="For each case.")
    ] = 120.0,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Cases that run side by side.")] = 1,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page about it.")
    ] = None,
    json: Json = False,
) -> None:
    """Run ONNX's test-suite, small models, or the ops of a model, through a target.

    Each case runs in a process with a time limit. Exit code 1 if a case gives wrong values or
    fails after it was claimed; a refusal with a reason is no failure.
    """
    import hal
    from hal.conformance import BUILT, FAILURES, fresh_cache, page, run_suite, select, summary
    from hal.targets import foreign, guarded, require_usable, resolve

    if html is not None:
        check_page("--html", html)
    found = resolve(target)
    name = found.name
    # In a process of its own, so that nothing of the target's software is in those of the cases.
    guarded(lambda _: require_usable(found), " or ".join(foreign([found])) or name, limit)
    chosen = select(
        target,
        ops=None if op is None else op.split(","),
        models=models,
        from_model=from_model,
        dims=parse_dims(dim or []),
        fallback=host,
    )
    with fresh_cache():
        running = run_suite(
            chosen.cases, target, fallback=chosen.fallback, native=False, jobs=jobs, limit=limit
        )
        outcomes = sorted(_watched(running, len(chosen.cases), json), key=lambda o: o.name)
    figures = summary(outcomes)
    if html is not None:
        html.write_text(page(name, hal.__version__, outcomes, chosen), encoding="utf-8")
    if json:
        print_json(
            {
                "target": name,
                "cases_from": chosen.title,
                "dims": [dataclasses.asdict(d) for d in chosen.dims],
                "left_out": chosen.left_out,
                **figures,
                "outcomes": [dataclasses.asdict(o) for o in outcomes],
            }
        )
    else:
        _print(name, outcomes, figures, chosen)
    bad = [o for o in outcomes if o.status in FAILURES]
    if bad:
        first = bad[0]
        raise CheckFailed(
            f"{name}: {len(bad)} of {len(outcomes)} cases failed, first {first.name}: "
            f"{first.status}, {first.reason[:200]}",
            "a target passes when what it claims is right; let it refuse the rest with a reason",
        )
    absent = [o.reason for o in outcomes if o.status == BUILT]
    if absent and not figures["passed"]:
        raise CheckFailed(
            f"{name}: {len(absent)} of {len(outcomes)} cases were built and none was run here:"
            f" {absent[0]}",
            "run it where the target's software and device are",
        )


def _watched(running: Any, total: int, quiet: bool) -> Any:
    from rich.console import Console
    from rich.progress import track

    return track(
        running, "running", total=total, disable=quiet, console=Console(stderr=True), transient=True
    )


def _print(
    name: str, outcomes: Sequence[Outcome], figures: dict[str, Any], chosen: Selection
) -> None:
    from hal.conformance import STATUSES

    for note in chosen.notes():
        print_line(note)
    if chosen.compared:
        rows = [
            (
                o.name,
                o.status,
                "" if o.max_error is None else f"{o.max_error:.2g}",
                "" if o.share is None else f"{o.share:.0%}",
                o.reason[:150] or o.about,
            )
            for o in outcomes
        ]
        print_table(f"{chosen.title} on {name}", ("case", "status", "max error", "share", ""), rows)
    else:
        ops = figures["per_op"].items()
        print_table(
            f"{chosen.title} on {name}",
            ("op", *STATUSES),
            [(op, *(str(counts.get(s, "")) for s in STATUSES)) for op, counts in ops],
        )
        reasons = collections.Counter(
            f"{o.status}: {o.reason[:150]}" for o in outcomes if o.status != "passed"
        )
        for reason, count in reasons.most_common(_REASONS):
            print_line(f"{count:5d}  {reason}")
    told = ", ".join(f"{figures[status]} {status}" for status in STATUSES)
    print_line(f"{name}: {figures['cases']} cases: {told}")
