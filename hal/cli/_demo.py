"""``hal demo``: the whole way on a small language model that comes with hal."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hal.cli._options import Json
from hal.cli._output import format_bytes, format_seconds, print_json, print_line, progress
from hal.cli._report import print_builds, print_passes
from hal.errors import CheckFailed, MissingExtraError, ModelError

if TYPE_CHECKING:
    from hal.bundle import Bundle

EXAMPLE = "Example: hal demo --prompt 'The with statement'"

ROUTES = ("host:onnxruntime", "host:tvm")


def demo_command(
    prompt: Annotated[
        str, typer.Option("--prompt", help="Text to continue.")
    ] = "The for statement",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 48,
    keep: Annotated[
        Path | None,
        typer.Option("--keep", metavar="FOLDER", help="Keep the bundles in this folder."),
    ] = None,
    json: Json = False,
) -> None:
    """Compile a small language model for two runtimes and show that they agree.

    Exit code 1 if the two do not give identical greedy tokens.
    """
    model = demo_model()
    folder = Path(tempfile.mkdtemp(prefix="hal-demo-")) if keep is None else keep
    folder.mkdir(parents=True, exist_ok=True)
    try:
        result = _run(model, folder, prompt, max_new_tokens, json)
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    if json:
        print_json(result)
    if not result["identical_tokens"]:
        raise CheckFailed(
            f"{' and '.join(ROUTES)} gave different greedy tokens",
            "one of the routes computes wrongly here: run hal verify on the bundle",
        )


def demo_model() -> Path:
    """Folder of the demonstration model: config, weights, tokenizer.

    Raises:
        ModelError: this installation has no demonstration model.
        MissingExtraError: a package that the demonstration needs is not installed.
    """
    for module, extra in (("transformers", "hf"), ("tvm", "tvm")):
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError("hal demo", extra)
    try:
        spec = importlib.util.find_spec("hal.demo_model")
    except ModuleNotFoundError:
        spec = None
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / "config.json").is_file():
            return Path(place)
    raise ModelError("the demonstration model is not installed", "reinstall hal-compiler")


def _run(model: Path, folder: Path, prompt: str, limit: int, quiet: bool) -> dict[str, Any]:
    bundle, seconds = _compile(model, folder / "demo.hal", quiet)
    if not quiet:
        print_passes(bundle.manifest.passes)
        print_builds(bundle.manifest.builds)
        size = format_bytes(bundle.path.stat().st_size)
        print_line(f"one bundle for both routes: {size}, compiled in {format_seconds(seconds)}")
    texts: dict[str, str] = {}
    tokens: dict[str, list[int]] = {}
    for route in ROUTES:
        texts[route], tokens[route] = _generate(bundle, route, prompt, limit, quiet)
    identical = len({tuple(ids) for ids in tokens.values()}) == 1
    if not quiet:
        verdict = "identical" if identical else "DIFFERENT"
        print_line(f"\n{ROUTES[0]} and {ROUTES[1]} gave {verdict} greedy tokens from one bundle")
    moved = _move(bundle, folder, prompt, limit, quiet)
    return {
        "prompt": prompt,
        "compile_seconds": seconds,
        "texts": texts,
        "token_ids": tokens,
        "identical_tokens": identical,
        "retargeted": moved,
        "passes": bundle.manifest.passes,
    }


def _compile(model: Path, output: Path, quiet: bool) -> tuple[Bundle, float]:
    import hal

    if not quiet:
        print_line(f"hal compile {model.name} --target {' --target '.join(ROUTES)} --explain\n")
    start = time.perf_counter()
    with progress(quiet) as say:
        bundle = hal.compile(str(model), target=list(ROUTES), output=output, progress=say)
    return bundle, time.perf_counter() - start


def _generate(
    bundle: Bundle, target: str, prompt: str, limit: int, quiet: bool
) -> tuple[str, list[int]]:
    with bundle.session(target) as session:
        steps = session.generate(prompt, max_new_tokens=limit)
        text = steps.text()
    if not quiet:
        rate = len(steps.token_ids) / steps.seconds if steps.seconds else 0.0
        print_line(f"\n--- {target} ({rate:.0f} tokens/s)\n{prompt}{text}")
    return text, steps.token_ids


def _move(bundle: Bundle, folder: Path, prompt: str, limit: int, quiet: bool) -> dict[str, Any]:
    """Rename the bundle, load it from its new place, and build it for another target."""
    import hal

    goal, target = folder / "moved.hal", _other_target()
    bundle.path.replace(folder / "renamed.hal")
    start = time.perf_counter()
    result = hal.load(folder / "renamed.hal").retarget(target, goal)
    seconds = time.perf_counter() - start
    if not quiet:
        print_line(f"\nmoved the bundle and retargeted it to {target} in {format_seconds(seconds)}")
    text, ids = _generate(result, target, prompt, limit, quiet)
    return {"target": target, "seconds": seconds, "text": text, "token_ids": ids}


def _other_target() -> str:
    """The generic level of this machine: another descriptor that can run here."""
    from hal.targets import resolve

    return f"{resolve('host').descriptor.extends or 'host'}:onnxruntime"
