"""``hal page``: a build as a static page for browsers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hal.cli._options import BundlePath, Json, open_bundle, path_of
from hal.cli._output import format_bytes, print_json, print_line, print_table

EXAMPLE = "Example: hal page my-model.hal --target wasm32 -o site"


def page_command(
    bundle: BundlePath,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FOLDER", help="A new folder.", parser=path_of),
    ],
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            "-t",
            metavar="NAME[:ROUTE]",
            help="Which build; default: the first that a browser can run.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Write a build as a static page that runs the model in a browser."""
    written = open_bundle(bundle).page(output, target)
    if json:
        print_json(written)
        return
    rows = [(name, format_bytes(size)) for name, size in written["files"].items()]
    print_line(f"{written['target']}: wrote {written['page']}")
    print_table("", ("file", "size"), rows)
    print_line(f"python -m http.server --directory {written['page']}")
