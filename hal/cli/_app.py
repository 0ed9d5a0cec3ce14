"""The commands, put together. Each lives in its own module, which imports what it needs itself."""

from __future__ import annotations

from typing import Annotated

import typer

import hal
from hal.cli import (
    _bench,
    _compile,
    _conformance,
    _demo,
    _eval,
    _inspect,
    _page,
    _run,
    _serve,
    _targets,
    _verify,
)


def create() -> typer.Typer:
    """A new application object."""
    app = typer.Typer(
        name="hal",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(epilog="Example: hal compile model.onnx -o model.hal && hal run model.hal")(_root)
    app.command("compile", epilog=_compile.COMPILE_EXAMPLE)(_compile.compile_command)
    app.command("run", epilog=_run.EXAMPLE)(_run.run_command)
    app.command("verify", epilog=_verify.EXAMPLE)(_verify.verify_command)
    app.command("inspect", epilog=_inspect.EXAMPLE)(_inspect.inspect_command)
    app.command("retarget", epilog=_compile.RETARGET_EXAMPLE)(_compile.retarget_command)
    app.command("page", epilog=_page.EXAMPLE)(_page.page_command)
    app.command("serve", epilog=_serve.EXAMPLE)(_serve.serve_command)
    app.command("bench", epilog=_bench.EXAMPLE)(_bench.bench_command)
    app.command("eval", epilog=_eval.EXAMPLE)(_eval.eval_command)
    app.command("conformance", epilog=_conformance.EXAMPLE)(_conformance.conformance_command)
    app.command("demo", epilog=_demo.EXAMPLE)(_demo.demo_command)
    app.add_typer(_targets.create(), name="targets")
    return app


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"hal {hal.__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version and exit."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (anywhere on the line).")
    ] = False,
) -> None:
    """Compile a model once, run it on any described chip."""
