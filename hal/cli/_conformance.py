"""``hal conformance``: a target against ONNX's test-suite and small models."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hal.cli._options import Json
from hal.cli._output import print_json, print_line, print_table
from hal.errors import CheckFailed, InputError, did_you_mean

if TYPE_CHECKING:
    from hal.conformance import Case, ModelCase, Outcome

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
    """Run ONNX's test-suite, or small models, through a target.

    Each case runs in a process with a time limit. Exit code 1 if a case gives wrong values or
    fails after it was claimed; a refusal with a reason is no failure.
    """
    import hal
    from hal.conformance import model_cases, page, run_suite, summary
    from hal.targets import resolve

    if html is not None and not html.parent.is_dir():
        raise InputError(f"--html {html}: there is no such folder", "make it first")
    name = resolve(target).name
    if models and op:
        raise InputError("--op picks cases of single ops, and --models has none", "give one")
    cases: Sequence[Case | ModelCase] = model_cases() if models else _node_cases(op)
    with _fresh_cache():
        running = run_suite(
            cases, target, fallback=host or models, native=False, jobs=jobs, limit=limit
        )
        outcomes = sorted(_watched(running, len(cases), json), key=lambda o: o.name)
    figures = summary(outcomes)
    if html is not None:
        html.write_text(page(name, hal.__version__, outcomes), encoding="utf-8")
    if json:
        print_json(
            {"target": name, **figures, "outcomes": [dataclasses.asdict(o) for o in outcomes]}
        )
    else:
        _print(name, outcomes, figures, models)
    bad = [o for o in outcomes if o.status in ("wrong", "error")]
    if bad:
        first = bad[0]
        raise CheckFailed(
            f"{name}: {len(bad)} of {len(outcomes)} cases failed, first {first.name}: "
            f"{first.status}, {first.reason[:200]}",
            "a target passes when what it claims is right; let it refuse the rest with a reason",
        )


@contextlib.contextmanager
def _fresh_cache() -> Iterator[None]:
    """A cache of its own for the block: builds by other code are not ours."""
    before = os.environ.get("HAL_CACHE")
    with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
        os.environ["HAL_CACHE"] = folder
        try:
            yield
        finally:
            del os.environ["HAL_CACHE"]
            if before is not None:
                os.environ["HAL_CACHE"] = before


def _node_cases(ops: str | None) -> list[Case]:
    from hal.conformance import node_cases

    cases = node_cases()
    if ops is None:
        return cases
    wanted = [name.strip() for name in ops.split(",") if name.strip()]
    known = {case.op for case in cases}
    for name in wanted:
        if name not in known:
            raise InputError(f"no case is about the op {name!r}", did_you_mean(name, known))
    return [case for case in cases if case.op in wanted]


def _watched(running: Any, total: int, quiet: bool) -> Any:
    from rich.console import Console
    from rich.progress import track

    return track(
        running, "running", total=total, disable=quiet, console=Console(stderr=True), transient=True
    )


def _print(name: str, outcomes: Sequence[Outcome], figures: dict[str, Any], models: bool) -> None:
    from hal.conformance import STATUSES

    if models:
        rows = [
            (
                o.name,
                o.status,
                "" if o.max_error is None else f"{o.max_error:.2g}",
                "" if o.share is None else f"{o.share:.0%}",
                o.reason,
            )
            for o in outcomes
        ]
        print_table(f"models on {name}", ("model", "status", "max error", "share", ""), rows)
    else:
        ops = figures["per_op"].items()
        print_table(
            f"ONNX's test-suite on {name}",
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
