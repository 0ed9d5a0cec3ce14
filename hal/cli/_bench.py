"""``hal bench``: latency, throughput, peak memory and load time of a bundle's builds."""

from __future__ import annotations

import dataclasses
import json as json_module
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hal.cli._bench_compare import comparison, print_comparison, second_bundle
from hal.cli._options import (
    BundlePath,
    Dims,
    Json,
    Seed,
    Targets,
    Threads,
    open_bundle,
    parse_dims,
    path_of,
)
from hal.cli._output import (
    format_bytes,
    format_seconds,
    print_json,
    print_line,
    print_table,
    progress,
)
from hal.errors import HalError, InputError, TargetError

if TYPE_CHECKING:
    from hal.bundle import Bundle

EXAMPLE = (
    "Example: hal bench my-model.hal --target host:tvm --prompt-tokens 32,512 --context 0,2048"
)


@dataclasses.dataclass(frozen=True)
class Case:
    """Tokens that the state holds before, and tokens of the prompt on top (language models)."""

    context: int
    prompt_tokens: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured, the same for every target."""

    rounds: int
    runs: int
    warmup: int
    cases: tuple[Case, ...]
    seed: int
    extents: dict[str, int]
    threads: int


@dataclasses.dataclass
class Samples:
    """Seconds of every run of one case, in order."""

    seconds: list[float] = dataclasses.field(default_factory=list)
    prefill_seconds: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Figures:
    """What came out for one target; ``resident`` is what the session added to the process."""

    bundle: str
    target: str
    load_seconds: float
    memory: int | None
    resident_at_load: dict[str, int] | None = None
    resident: dict[str, int] | None = None
    cases: dict[Case, Samples] = dataclasses.field(default_factory=dict)


def bench_command(
    bundle: BundlePath,
    target: Targets = None,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, help="Rounds; in each, every target has its turn.")
    ] = 5,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Calls in a round.")] = 20,
    warmup: Annotated[
        int, typer.Option("--warmup", min=0, help="Calls before the first round.")
    ] = 3,
    prompt_tokens: Annotated[
        str | None,
        typer.Option(
            "--prompt-tokens", metavar="N,…", help="Lengths of prompts (language models). [32]"
        ),
    ] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option(
            "--new-tokens", min=1, help="Tokens decoded in a round (language models). [--runs]"
        ),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            "--context", metavar="N,…", help="Tokens held before the prompt (language models). [0]"
        ),
    ] = None,
    compare_float: Annotated[
        Path | None,
        typer.Option(
            "--compare-float",
            metavar="FLOAT",
            help="The bundle of the same model before it was quantized: does quantization gain?",
            parser=path_of,
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            "--against", metavar="OTHER", help="Another bundle to compare with.", parser=path_of
        ),
    ] = None,
    dim: Dims = None,
    seed: Seed = 0,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Measure builds of a bundle, in turns: latency, throughput, peak memory, load time.

    Of a language model: prompt and decoded tokens a second, for each context and prompt length.
    Two bundles' builds for the same targets are compared with --compare-float or --against.
    """
    opened = open_bundle(bundle)
    other = second_bundle(opened, compare_float, against)
    names = _targets(opened, target, other)
    extents = {"batch": 1, **parse_dims(dim or [])}
    steps = new_tokens or runs
    cases = _cases(
        opened, prompt_tokens, context, steps if new_tokens else None, max(warmup, steps)
    )
    plan = Plan(rounds, steps, warmup, cases, seed, extents, threads or usable_cores())
    with progress(quiet=json) as say:
        say(f"measuring {', '.join(names)}")
        paths = [bundle] if other is None else [bundle, other.path]
        figures = measure([(path, name) for name in names for path in paths], plan)
    result = _result(opened, figures, plan)
    if other is not None:
        words = ("quantized", "float") if compare_float else (bundle.name, other.path.name)
        result["comparison"] = comparison(figures, runs=plan.runs, words=words)
    if json:
        print_json(result)
    else:
        _print(result)


def _targets(bundle: Bundle, asked: Sequence[str] | None, other: Bundle | None) -> list[str]:
    """The builds to measure: those asked for, or all that every bundle has.

    Raises:
        TargetError: there is none, or one that was asked for is missing.
    """
    from hal.runtime.opening import find_build

    bundles = [bundle] if other is None else [bundle, other]
    names = list(asked or bundle.targets)
    if other is not None and not asked:
        names = [name for name in names if find_build(name, other.targets) is not None]
    for each in bundles:
        if not names or not each.targets:
            raise TargetError(
                f"{each.path} has no builds"
                if other is None
                else "the bundles have no builds for the same target",
                f"hal retarget {each.path} --target host -o OUT.hal",
            )
        for name in names:
            if find_build(name, each.targets) is None:
                raise TargetError(
                    f"the bundle has no build for {name!r}"
                    f" ({each.path.name} has {', '.join(each.targets)})",
                    f"add one: hal retarget {each.path} --target {name} -o OUT.hal",
                )
    return names


def _cases(
    bundle: Bundle, prompts: str | None, contexts: str | None, new_tokens: int | None, steps: int
) -> tuple[Case, ...]:
    """Every context with every prompt, short ones first: each goes on where the last one ended.

    Raises:
        InputError: a list does not read so, the model is no language model, or a case has more
            tokens than the model has positions.
    """
    given = [
        name
        for name, value in (
            ("--prompt-tokens", prompts),
            ("--new-tokens", new_tokens),
            ("--context", contexts),
        )
        if value is not None
    ]
    if bundle.manifest.task != "causal-lm" and given:
        raise InputError(
            f"{given[0]} is for language models, the bundle's task is {bundle.manifest.task!r}",
            "leave it out",
        )
    cases = tuple(
        Case(context, prompt)
        for context in sorted(_numbers("--context", "0" if contexts is None else contexts, 0))
        for prompt in _numbers("--prompt-tokens", "32" if prompts is None else prompts, 1)
    )
    positions = bundle.manifest.metadata.get("max_positions")
    longest = max(case.context + case.prompt_tokens for case in cases) + steps
    if bundle.manifest.task == "causal-lm" and positions and longest > positions:
        raise InputError(
            f"context, prompt and new tokens are {longest} together, "
            f"the model has {positions} positions",
            "measure shorter texts",
        )
    return cases


def _numbers(option: str, text: str, least: int) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) >= least for part in parts):
        raise InputError(
            f"{option} {text!r} is not a list of whole numbers from {least}",
            f"for example {option} 32,512",
        )
    return list(dict.fromkeys(int(part) for part in parts))


class Worker:
    """One process with one session; see :mod:`hal.cli._worker`."""

    def __init__(self, bundle: Path, target: str, plan: Plan) -> None:
        self.target = target
        environment = {**os.environ, "OMP_NUM_THREADS": str(plan.threads)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hal.cli._worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        try:
            loaded = self._ask(
                {"do": "load", "bundle": str(bundle), "target": target, "threads": plan.threads}
            )
        except BaseException:
            self.close()
            raise
        self.figures = Figures(
            str(bundle),
            loaded["target"],
            loaded["load_seconds"],
            loaded["memory"],
            loaded["resident"],
        )

    def round(self, plan: Plan, case: Case, runs: int, *, keep: bool = True) -> None:
        """Measure one round of a case; a warm-up round is not kept."""
        answer = self._ask(
            {
                "do": "measure",
                "runs": runs,
                "seed": plan.seed,
                "extents": plan.extents,
                "prompt_tokens": case.prompt_tokens,
                "context": case.context,
            }
        )
        self.figures.memory, self.figures.resident = answer["memory"], answer["resident"]
        if keep:
            samples = self.figures.cases.setdefault(case, Samples())
            samples.seconds += answer["seconds"]
            if "prefill_seconds" in answer:
                samples.prefill_seconds.append(answer["prefill_seconds"])

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = ""
        try:
            self._process.stdin.write(json_module.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            pass
        if not line:
            code = self._process.wait()
            raise TargetError(
                f"the process that measures {self.target} died with exit code {code}",
                "run the build alone to see why: hal run BUNDLE --target " + self.target,
            )
        answer: dict[str, Any] = json_module.loads(line)
        if "error" in answer:
            raise HalError(answer["error"], answer["hint"])
        return answer

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def measure(builds: Sequence[tuple[Path, str]], plan: Plan) -> list[Figures]:
    """Measure builds (bundle and target), each in its own process.

    All have their turn in every round, each second time in reverse, so drift hits them alike.

    Raises:
        HalError: a build cannot be loaded or run.
    """
    workers: list[Worker] = []
    try:
        for bundle, target in builds:
            workers.append(Worker(bundle, target, plan))
        for case in plan.cases:
            if plan.warmup:
                for worker in workers:
                    worker.round(plan, case, plan.warmup, keep=False)
            for turn in range(plan.rounds):
                for worker in reversed(workers) if turn % 2 else workers:
                    worker.round(plan, case, plan.runs)
        return [worker.figures for worker in workers]
    finally:
        for worker in workers:
            worker.close()


def usable_cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest-rank percentile; ``share`` in 0..1."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered)) - 1))]


def _result(bundle: Bundle, figures: Sequence[Figures], plan: Plan) -> dict[str, Any]:
    from hal.targets.detect import detect

    manifest = bundle.manifest
    generates = manifest.task == "causal-lm"
    versions: dict[str, str] = {"python": platform.python_version()}
    for record in manifest.builds.values():
        versions |= record.toolchain
    return {
        "bundle": str(bundle.path),
        "task": manifest.task,
        "machine": {"cpu": detect().model, "cores": usable_cores(), "threads": plan.threads},
        "versions": versions,
        "plan": dataclasses.asdict(plan),
        "targets": [_target_result(f, plan, generates) for f in figures],
    }


def _target_result(figures: Figures, plan: Plan, generates: bool) -> dict[str, Any]:
    """Figures of one target; for a language model those of each case, and of the first as such."""
    batch = plan.extents["batch"]
    cases = [_case_result(c, s, batch, generates) for c, s in figures.cases.items()]
    result: dict[str, Any] = {
        "bundle": figures.bundle,
        "target": figures.target,
        "load_seconds": figures.load_seconds,
        "peak_memory_bytes": figures.memory,
        "resident_at_load": figures.resident_at_load,
        "resident": figures.resident,
        **cases[0],
    }
    return {**result, "cases": cases} if generates else result


def _case_result(case: Case, samples: Samples, batch: int, generates: bool) -> dict[str, Any]:
    median = statistics.median(samples.seconds)
    result: dict[str, Any] = {
        "runs": len(samples.seconds),
        "latency_seconds": {
            "p50": median,
            "p90": percentile(samples.seconds, 0.90),
            "p99": percentile(samples.seconds, 0.99),
            "min": min(samples.seconds),
        },
        "per_second": batch / median if median else None,
    }
    if generates:
        prefill = statistics.median(samples.prefill_seconds)
        result |= dataclasses.asdict(case)
        result["decode_tokens_per_second"] = result["per_second"]
        result["prefill_seconds"] = {"p50": prefill, "min": min(samples.prefill_seconds)}
        result["prefill_tokens_per_second"] = batch * case.prompt_tokens / prefill
    return result


def _print(result: dict[str, Any]) -> None:
    first = result["targets"][0]
    title = f"{result['bundle']} ({first['runs']} runs each)"
    if "cases" in first:
        _print_language_model(title, result)
    else:
        columns = ["target", "p50", "p90", "p99", "items/s", "load", "peak memory"]
        rows = [
            [_name(result, item), *_latencies(item), f"{item['per_second']:.1f}", *_loading(item)]
            for item in result["targets"]
        ]
        print_table(title, columns, rows)
    if "comparison" in result:
        print_comparison(result)
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    print_line(f"{machine['cpu']}, {machine['threads']} thread(s) of {machine['cores']} core(s)")
    print_line(versions)


def _print_language_model(title: str, result: dict[str, Any]) -> None:
    columns = ["target", "context", "prompt", "prefill tokens/s", "decode tokens/s"]
    columns += ["p50", "p90", "p99"]
    rows = [
        [
            _name(result, item),
            case["context"],
            case["prompt_tokens"],
            f"{case['prefill_tokens_per_second']:.1f}",
            f"{case['decode_tokens_per_second']:.1f}",
            *_latencies(case),
        ]
        for item in result["targets"]
        for case in item["cases"]
    ]
    print_table(title, columns, rows)
    rows = [[_name(result, item), *_loading(item)] for item in result["targets"]]
    print_table("", ["target", "load", "peak memory"], rows)


def _name(result: dict[str, Any], item: dict[str, Any]) -> str:
    """A row's target, and the bundle where there are two."""
    target = str(item["target"])
    return f"{target}, {Path(item['bundle']).name}" if "comparison" in result else target


def _latencies(item: dict[str, Any]) -> list[str]:
    return [format_seconds(item["latency_seconds"][p]) for p in ("p50", "p90", "p99")]


def _loading(item: dict[str, Any]) -> list[str]:
    return [format_seconds(item["load_seconds"]), format_bytes(item["peak_memory_bytes"])]
