"""``hal compile`` and ``hal retarget``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hal.cli._options import (
    BundlePath,
    Json,
    Limit,
    Output,
    Targets,
    dynamic_of,
    example_inputs,
    open_bundle,
    parse_dims,
    parse_dynamic,
    parse_input,
)
from hal.cli._output import format_bytes, format_seconds, print_json, print_line, progress
from hal.cli._report import build_json, print_builds, print_passes, print_quantization
from hal.errors import InputError

if TYPE_CHECKING:
    from hal.bundle import Bundle

COMPILE_EXAMPLE = "Example: hal compile ./my-model -o my-model.hal --target host --target host:tvm"
RETARGET_EXAMPLE = "Example: hal retarget my-model.hal --target x86-64-v3:tvm -o other.hal"

Explain = Annotated[
    bool,
    typer.Option("--explain", help="Print the passes: changes, nodes, bytes and time of each."),
]
NoVerify = Annotated[
    bool, typer.Option("--no-verify", help="Do not run the builds against the reference.")
]
KvCache = Annotated[
    str | None,
    typer.Option(
        "--kv-cache",
        metavar="WORDS",
        help="What a language model carries (auto, latent, expanded, exported; set by compile) "
        "and how (contiguous, paged, int8, int4); combine with commas.",
    ),
]
Dims = Annotated[
    list[str] | None,
    typer.Option(
        "--dim",
        metavar="NAME=N",
        help="Fix a dynamic dim, for static chips; repeatable. A language model has three: rows, "
        "tokens in a step, positions in its cache.",
    ),
]
NoFallback = Annotated[
    bool,
    typer.Option("--no-fallback", help="Fail, with the list, if the target refuses any node."),
]


def compile_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="An .onnx or .pt2 file, a Hugging Face directory, or python:module:callable.",
        ),
    ],
    output: Output,
    target: Targets = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input", "-i", metavar="NAME:DTYPE:DIMS", help="An example input; repeatable."
        ),
    ] = None,
    dynamic: Annotated[
        list[str] | None,
        typer.Option("--dynamic", metavar="NAME:AXIS=SYM", help="A free axis; repeatable."),
    ] = None,
    dim: Dims = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            "--quantize",
            "-q",
            metavar="RECIPE",
            help="Weights in few bits: w8a8, w4a16-g32:gptq, ternary, …, auto, or a plan.toml; "
            "single kinds as in w4a16,head=w8a16,embedding=float.",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            metavar="PATH",
            help="Data to look at and measure on: a text, a .npy of token ids, an .npz of inputs, "
            "a folder of images.",
        ),
    ] = None,
    accuracy_budget: Annotated[
        str | None,
        typer.Option(
            "--accuracy-budget",
            metavar="BOUND",
            help="Fewest bytes with top1>=0.99, kl<=0.02, ppl<=1.01x or cosine>=0.999.",
        ),
    ] = None,
    size_budget: Annotated[
        str | None,
        typer.Option("--size-budget", metavar="SIZE", help="Best accuracy in, say, 300MB."),
    ] = None,
    save_plan: Annotated[
        Path | None,
        typer.Option("--save-plan", metavar="FILE", help="Write each layer's format as TOML."),
    ] = None,
    kv_cache: KvCache = None,
    explain: Explain = False,
    no_verify: NoVerify = False,
    no_fallback: NoFallback = False,
    limit: Limit = None,
    json: Json = False,
) -> None:
    """Compile a model into a bundle for one or more targets."""
    if save_plan is not None and quantize is None:
        raise InputError("--save-plan is given, but nothing is to be quantized", "add --quantize")
    if save_plan is not None and not save_plan.parent.is_dir():
        raise InputError(f"--save-plan {save_plan}: there is no such folder", "make it first")
    specs = [parse_input(text) for text in inputs or []]
    free = dynamic_of(specs)
    for name, axes in parse_dynamic(dynamic or []).items():
        free.setdefault(name, {}).update(axes)
    import hal

    targets = target or ["host"]

    def work(report: Callable[[str], None]) -> None:
        start = time.perf_counter()
        with progress(quiet=json) as say:
            bundle = hal.compile(
                model,
                example_inputs(specs) if specs else None,
                target=targets,
                output=output,
                dynamic=free or None,
                dims=parse_dims(dim or []),
                quantize=quantize,
                calibration=calibration,
                accuracy_budget=accuracy_budget,
                size_budget=size_budget,
                kv_cache="auto" if kv_cache is None else kv_cache,
                verify=not no_verify,
                fallback=not no_fallback,
                progress=_both(report, say),
            )
        if save_plan is not None:
            save_plan.write_text(_plan_text(bundle), encoding="utf-8")
        _print_result(bundle, time.perf_counter() - start, explain, json)

    _survived(targets, output, limit, work)


def retarget_command(
    bundle: BundlePath,
    target: Annotated[
        list[str],
        typer.Option("--target", "-t", metavar="NAME[:ROUTE]", help="The new target; repeatable."),
    ],
    output: Output,
    dim: Dims = None,
    kv_cache: KvCache = None,
    no_verify: NoVerify = False,
    no_fallback: NoFallback = False,
    limit: Limit = None,
    json: Json = False,
) -> None:
    """Build a bundle for other targets, without the original model and without torch."""
    source = open_bundle(bundle)

    def work(report: Callable[[str], None]) -> None:
        start = time.perf_counter()
        with progress(quiet=json) as say:
            say(f"building for {', '.join(target)}")
            report(f"building for {', '.join(target)}")
            result = source.retarget(
                target,
                output,
                dims=parse_dims(dim or []),
                kv_cache=kv_cache,
                verify=not no_verify,
                fallback=not no_fallback,
            )
        _print_result(result, time.perf_counter() - start, False, json)

    _survived(target, output, limit, work)


def _both(report: Callable[[str], None], say: Callable[[str], None]) -> Callable[[str], None]:
    def told(sentence: str) -> None:
        report(sentence)
        say(sentence)

    return told


def _survived(
    targets: Sequence[str],
    output: Path,
    limit: float | None,
    work: Callable[[Callable[[str], None]], None],
) -> None:
    """Do the work; in a process of its own if software of others has a part in it.

    Raises:
        TargetError: that software ended the process, or took longer than ``limit`` seconds.
    """
    from hal.bundle.output import without_leftovers
    from hal.targets import foreign, guarded, resolve

    others = foreign([resolve(name) for name in targets])
    if not others and limit is None:
        work(lambda _: None)
        return
    with without_leftovers(output):
        guarded(work, " or ".join(others) or "the compilation", limit, theirs=bool(others))


def _print_result(bundle: Bundle, seconds: float, explain: bool, as_json: bool) -> None:
    size = bundle_bytes(bundle.path)
    manifest = bundle.manifest
    if as_json:
        result: dict[str, Any] = {
            "bundle": str(bundle.path),
            "name": manifest.name,
            "task": manifest.task,
            "bytes": size,
            "seconds": seconds,
            "builds": {name: build_json(record) for name, record in manifest.builds.items()},
            "passes": manifest.passes,
            "quantization": manifest.metadata.get("quantization"),
        }
        print_json(result)
        return
    if explain:
        print_passes(manifest.passes)
    print_quantization(manifest.metadata.get("quantization"), each=explain)
    print_builds(manifest.builds, manifest.metadata.get("quantization"))
    print_line(
        f"wrote {bundle.path} ({format_bytes(size)}) with {len(manifest.builds)} build(s) "
        f"in {format_seconds(seconds)}"
    )


def _plan_text(bundle: Bundle) -> str:
    """What each layer of a quantized bundle got, as TOML."""
    from hal.quantization import plan_of_report

    facts = bundle.manifest.metadata.get("quantization")
    if not facts:  # floats were what met the budget
        return 'recipe = "float"\n'
    return str(facts.get("plan") or plan_of_report(facts).to_toml())


def bundle_bytes(path: Path) -> int:
    """Size of a bundle on disk."""
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
