"""``hal verify``: builds of a bundle against the reference, or against a model."""

from __future__ import annotations

from typing import Annotated

import typer

from hal.cli._options import BundlePath, Json, Limit, Target, open_bundle, survived
from hal.cli._output import print_json, print_line, progress
from hal.cli._report import verification_text

EXAMPLE = "Example: hal verify my-model.hal --target host:tvm --against my-model.onnx"


def verify_command(
    bundle: BundlePath,
    target: Target = None,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="MODEL", help="Compare with this model's own results."),
    ] = None,
    limit: Limit = None,
    json: Json = False,
) -> None:
    """Run builds against the reference; exit code 1 if one is out of tolerance."""
    opened = open_bundle(bundle)

    def work() -> None:
        with progress(quiet=json) as say:
            say("computing the reference and running the builds")
            results = opened.verify(target, against=against)
        if json:
            print_json({"bundle": str(bundle), "against": against, "builds": results})
            return
        for name, figures in results.items():
            calls = f" ({figures['calls']} call(s))" if "calls" in figures else ""
            print_line(f"{name}: {verification_text(figures)}{calls}")

    survived(opened, target, work, limit)
