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

from hal.cli._options import (
    BundlePath,
    Dims,
    Json,
    Seed,
    Targets,
    Threads,
    open_bundle,
    parse_dims,
)
from hal.cli._output import (
    format_bytes,
    format_seconds,
    print_json,
    print_line,
    print_table,
    progress,
)
from hal.errors import HalError, TargetError

if TYPE_CHECKING:
    from hal.bundle import Bundle

EXAMPLE = "Example: hal bench my-model.hal --target host:onnxruntime --target host:tvm"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured, the same for every target."""

    rounds: int
    runs: int
    warmup: int
    prompt_tokens: int
    seed: int
    extents: dict[str, int]
    threads: int


@dataclasses.dataclass
class Figures:
    """What came out for one target; seconds of every run, in order."""

    target: str
    load_seconds: float
    memory: int | None
    seconds: list[float] = dataclasses.field(default_factory=list)
    prefill_seconds: list[float] = dataclasses.field(default_factory=list)


def bench_command(
    bundle: BundlePath,
    target: Targets = None,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, help="Rounds; in each, every target has its turn.")
    ] = 5,
    runs: Annotated[
        int, typer.Option("--runs", min=1, help="Calls (or decoded tokens) in a round.")
    ] = 20,
    warmup: Annotated[
        int, typer.Option("--warmup", min=0, help="Calls before the first round.")
    ] = 3,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", min=1, help="Length of the prompt (language models).")
    ] = 32,
    dim: Dims = None,
    seed: Seed = 0,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Measure builds of a bundle, in turns: latency, throughput, peak memory, load time."""
    from hal.runtime.session import find_build

    opened = open_bundle(bundle)
    names = target or list(opened.targets)
    if not names:
        raise TargetError(
            f"{bundle} has no builds", f"hal retarget {bundle} --target host -o OUT.hal"
        )
    for name in names:
        if find_build(name, opened.targets) is None:
            raise TargetError(
                f"the bundle has no build for {name!r} (it has {', '.join(opened.targets)})",
                f"add one: hal retarget {bundle} --target {name} -o OUT.hal",
            )
    extents = {"batch": 1, **parse_dims(dim or [])}
    plan = Plan(rounds, runs, warmup, prompt_tokens, seed, extents, threads or usable_cores())
    with progress(quiet=json) as say:
        say(f"measuring {', '.join(names)}")
        figures = measure(bundle, names, plan)
    result = _result(opened, figures, plan)
    if json:
        print_json(result)
    else:
        _print(result)


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
        self.figures = Figures(loaded["target"], loaded["load_seconds"], loaded["memory"])

    def round(self, plan: Plan, runs: int, *, keep: bool = True) -> None:
        """Measure one round; a warm-up round is not kept."""
        answer = self._ask(
            {
                "do": "measure",
                "runs": runs,
                "seed": plan.seed,
                "extents": plan.extents,
                "prompt_tokens": plan.prompt_tokens,
            }
        )
        self.figures.memory = answer["memory"]
        if keep:
            self.figures.seconds += answer["seconds"]
            if "prefill_seconds" in answer:
                self.figures.prefill_seconds.append(answer["prefill_seconds"])

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


def measure(bundle: Path, targets: Sequence[str], plan: Plan) -> list[Figures]:
    """Measure each target in its own process; rounds alternate, so drift hits all of them alike.

    Raises:
        HalError: a build cannot be loaded or run.
    """
    workers: list[Worker] = []
    try:
        for target in targets:
            workers.append(Worker(bundle, target, plan))
        if plan.warmup:
            for worker in workers:
                worker.round(plan, plan.warmup, keep=False)
        for _ in range(plan.rounds):
            for worker in workers:
                worker.round(plan, plan.runs)
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
    median = statistics.median(figures.seconds)
    batch = plan.extents["batch"]
    result: dict[str, Any] = {
        "target": figures.target,
        "load_seconds": figures.load_seconds,
        "peak_memory_bytes": figures.memory,
        "runs": len(figures.seconds),
        "latency_seconds": {
            "p50": median,
            "p90": percentile(figures.seconds, 0.90),
            "p99": percentile(figures.seconds, 0.99),
            "min": min(figures.seconds),
        },
        "per_second": batch / median if median else None,
    }
    if generates:
        prefill = statistics.median(figures.prefill_seconds)
        result["decode_tokens_per_second"] = result["per_second"]
        result["prefill_tokens_per_second"] = batch * plan.prompt_tokens / prefill
    return result


def _print(result: dict[str, Any]) -> None:
    generates = "prefill_tokens_per_second" in result["targets"][0]
    columns = ["target", "p50", "p90", "p99"]
    columns += ["decode tokens/s", "prefill tokens/s"] if generates else ["items/s"]
    columns += ["load", "peak memory"]
    rows = []
    for item in result["targets"]:
        latency = item["latency_seconds"]
        row = [item["target"], *(format_seconds(latency[p]) for p in ("p50", "p90", "p99"))]
        row.append(f"{item['per_second']:.1f}")
        if generates:
            row.append(f"{item['prefill_tokens_per_second']:.1f}")
        row += [format_seconds(item["load_seconds"]), format_bytes(item["peak_memory_bytes"])]
        rows.append(row)
    print_table(f"{result['bundle']} ({result['targets'][0]['runs']} runs each)", columns, rows)
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    print_line(f"{machine['cpu']}, {machine['threads']} thread(s) of {machine['cores']} core(s)")
    print_line(versions)
