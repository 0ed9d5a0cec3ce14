"""``hal eval``: how good a bundle is on data, and how far from another."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hal.cli._options import BundlePath, Json, Target, Threads, path_of
from hal.cli._output import print_facts, print_json, print_line, print_table
from hal.errors import InputError

if TYPE_CHECKING:
    from hal.runtime.evaluation import Evaluation
    from hal.runtime.scoring import Estimate, Progress

EXAMPLE = "Example: hal eval small.hal --text book.txt --against my-model.hal"


def eval_command(
    bundle: BundlePath,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text", metavar="FILE", help="A text file (language models).", parser=path_of
        ),
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(
            "--tokens", metavar="FILE.npy", help="Token ids (language models).", parser=path_of
        ),
    ] = None,
    inputs: Annotated[
        Path | None,
        typer.Option(
            "--inputs",
            metavar="FILE.npz",
            help="Examples by input name (other models).",
            parser=path_of,
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option("--labels", metavar="FILE.npy", help="The examples' classes.", parser=path_of),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            "--against", metavar="OTHER", help="A bundle to compare with.", parser=path_of
        ),
    ] = None,
    target: Target = None,
    against_target: Annotated[
        str | None,
        typer.Option(
            "--against-target",
            metavar="NAME[:ROUTE]",
            help="Which build of OTHER (without --against: of BUNDLE); default: the same.",
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            "--window", min=1, help="Tokens predicted in one go. [512, or the model's positions]"
        ),
    ] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Score a bundle: perplexity, divergence and agreement, or errors and accuracy.

    Every mean comes with a 95 % interval: the bootstrap over windows of a text, or over examples.
    """
    from hal.runtime.evaluation import evaluate

    if sum(given is not None for given in (text, tokens, inputs)) != 1:
        raise InputError(
            "give exactly one of --text, --tokens and --inputs",
            "--text or --tokens for a language model, --inputs for others",
        )
    content = None if text is None else _read_text(text)
    with _progress(quiet=json) as report:
        found = evaluate(
            bundle,
            text=content,
            tokens=tokens,
            inputs=inputs,
            labels=labels,
            against=against,
            target=target,
            against_target=against_target,
            window=window,
            threads=threads,
            progress=report,
        )
    if json:
        print_json({"bundle": str(bundle), **found.to_json()})
    else:
        _print(str(bundle), found)


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"{path}: there is no such file", "check the path")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no UTF-8 text: {error}", "convert it first") from error


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Progress | None]:
    """A bar with the time left, on a terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("scoring", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("scoring", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print(bundle: str, found: Evaluation) -> None:
    title = f"{bundle}, {found.target}"
    if found.against:
        title += f"; reference: {found.against}, {found.against_target}"
    print_line(title)
    if found.text is not None:
        print_line(
            f"{found.text.positions:,} tokens in {found.text.windows:,} windows of "
            f"{found.window}; 95 % intervals by bootstrap over windows"
        )
        print_table("", ["figure", "value", "95 % interval"], _text_rows(found))
        return
    print_line(f"{found.examples:,} examples; 95 % intervals by bootstrap over examples")
    shares = [("accuracy", found.accuracy), ("reference's accuracy", found.reference_accuracy)]
    print_facts("", [(name, _shown(share, "{:.2%}")) for name, share in shares if share])
    if found.outputs is not None:
        columns = ["output", "cosine", "worst", "relative error", "max error", "top-1 agreement"]
        rows = [
            [
                name,
                _shown(score.cosine, "{:.6f}"),
                f"{score.cosine_min:.6f}",
                _shown(score.relative_error, "{:.3g}"),
                f"{score.max_error:.3g}",
                _shown(score.top1_agreement, "{:.2%}"),
            ]
            for name, score in found.outputs.items()
        ]
        print_table("", columns, rows)


def _text_rows(found: Evaluation) -> list[list[Any]]:
    assert found.text is not None
    rows = [_row("perplexity", found.text.perplexity, "{:.4g}")]
    other = found.text.comparison
    if other is not None:
        rows += [
            _row("reference's perplexity", other.perplexity, "{:.4g}"),
            _row("perplexity ratio", other.perplexity_ratio, "{:.4f}"),
            _row("KL divergence (nats)", other.kl_divergence, "{:.4g}"),
            ["its 99th percentile", f"{other.kl_p99:.4g}", ""],
            _row("top-1 agreement", other.top1_agreement, "{:.2%}"),
        ]
    return rows


def _row(name: str, estimate: Estimate, form: str) -> list[str]:
    return [name, form.format(estimate.value), _interval(estimate, form)]


def _interval(estimate: Estimate, form: str) -> str:
    if estimate.low is None or estimate.high is None:
        return "needs two blocks"
    return f"{form.format(estimate.low)} … {form.format(estimate.high)}"


def _shown(estimate: Estimate | None, form: str) -> str | None:
    if estimate is None:
        return None
    return f"{form.format(estimate.value)} ({_interval(estimate, form)})"
