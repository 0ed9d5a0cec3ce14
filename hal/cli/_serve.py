"""``hal serve``: a bundle behind OpenAI's HTTP interface."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from hal.cli._options import BundlePath, Json, Target, Threads, open_bundle
from hal.cli._output import print_json, print_line

if TYPE_CHECKING:
    from hal.server import Model

EXAMPLE = "Example: hal serve my-model.hal --port 8000"


def serve_command(
    bundle: BundlePath,
    target: Target = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; 0.0.0.0: every one.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port; 0: any that is free.")
    ] = 8000,
    name: Annotated[
        str | None, typer.Option("--name", help="The model's name; default: the bundle's.")
    ] = None,
    max_batch: Annotated[
        int, typer.Option("--max-batch", min=1, help="Most sequences that run together.")
    ] = 16,
    queue: Annotated[
        int, typer.Option("--queue", min=1, help="Most requests that wait; more get a 429.")
    ] = 256,
    max_pages: Annotated[
        int | None, typer.Option("--max-pages", min=1, help="Most pages of the cache, for all.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Most tokens that a request may ask for.")
    ] = 4096,
    max_body: Annotated[
        int, typer.Option("--max-body", min=1, metavar="BYTES", help="Largest body of a request.")
    ] = 4 << 20,
    drain: Annotated[
        int, typer.Option("--drain", min=0, metavar="SECONDS", help="For requests at the end.")
    ] = 30,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key", envvar="HAL_API_KEY", help="What clients have to send; default: nothing."
        ),
    ] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Serve a bundle over HTTP until SIGTERM or Ctrl-C."""
    from hal import server
    from hal.runtime.engine import EngineOptions

    options = server.ServerOptions(
        name=name or bundle.stem,
        api_key=api_key,
        max_tokens=max_tokens,
        max_body_bytes=max_body,
        drain_seconds=drain,
    )
    limits = EngineOptions(max_batch=max_batch, max_waiting=queue, max_pages=max_pages)
    listening = server.bind(host, port)  # before the model is loaded, which may take long
    try:
        model = server.open_model(open_bundle(bundle), target, threads=threads, options=limits)
        address = f"http://{host}:{listening.getsockname()[1]}"
        facts = _facts(model, options.name, address)
        app = server.create_app(model, options)
        server.run(app, listening, options, lambda: _tell(facts, json))
    finally:
        listening.close()
    if not json:
        print_line("stopped")


def _facts(model: Model, name: str, address: str) -> dict[str, str | int]:
    facts: dict[str, str | int] = {
        "model": name,
        "address": address,
        "target": model.session.target,
    }
    if model.engine is not None:
        facts["max_batch"] = model.engine.max_batch
    return facts


def _tell(facts: dict[str, str | int], as_json: bool) -> None:
    if as_json:
        print_json(facts)
    else:
        batch = f", {facts['max_batch']} at once" if "max_batch" in facts else ""
        print_line(f"{facts['model']} at {facts['address']}/v1 ({facts['target']}{batch})")
    sys.stdout.flush()
