"""Which targets of the library run here, how, and how near to the reference: docs/targets.md.

::

    python benchmarks/targets.py                          # all that can be set up here
    python benchmarks/targets.py openvino wasm32          # these; rows of the others are kept
    python benchmarks/targets.py wasm32 --model encoder   # one model; other cells are kept too

Each target is set up (``hal targets setup``) and runs the small models of ``hal conformance``, in
processes with a time limit. A target that cannot be set up is listed with the reason.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import hal
from hal.conformance import model_cases, run_suite
from hal.errors import HalError
from hal.runtime.here import NOT_RUN
from hal.targets import load_backend, resolve

ROOT = Path(__file__).resolve().parents[1]
TARGETS = (
    "host:onnxruntime",
    "host:tvm",
    "openvino",
    "hexagon-v73",
    "hexagon-v75",
    "rk3588",
    "webgpu",
    "raspberry-pi-5:c",
    "graviton3:c",
    "graviton4:c",
    "rv64gcv:c",
    "spacemit-k1:c",
    "wasm32",
    "wasm32:browser",
    "h200-sxm:cuda",
    "h200-sxm:emulated",
    "jetson-agx-orin-64gb:cuda",
)
MODELS = {
    "mlp": "perceptron",
    "cnn": "CNN float32",
    "cnn-int8": "CNN int8",
    "encoder": "encoder",
    "language-model": "language model",
}
CHECKED = (
    "the toolkit has compiled every kernel and lists those that are called, each within the chip's"
    " threads and shared memory of a block"
)
MARKS = "<!-- targets -->", "<!-- end of targets -->"
"""Between them README.md has the table."""

START = """# Targets that run

Written by `benchmarks/targets.py` from real runs. A cell has the largest difference of an output
from the neutral graph's reference in float32 (an int8 model's from its own), and the share of
nodes that the target ran itself; the host ran the others. The language model takes a prompt and two
more tokens on the state that it carries; on targets with static shapes as steps of one token, with
room for 64 positions.
*Built*: the same without the run.
"""


def how(target: str) -> str:
    """What runs the programs here: the chip itself, an emulator, a simulator, or nothing."""
    found = resolve(target)
    if load_backend(found.backend).cannot_run(found.descriptor):
        return "nothing: built only"
    if found.route_name == "emulated":
        return "the processor, thread by thread"
    if found.backend == "aot":
        from hal.targets.aot import AotOptions

        options = AotOptions.of_route(found.route)
        if options.machine == platform.machine():
            return "native"
        if options.in_page:
            return "headless Chromium"
        return Path(options.run[0]).name.removesuffix("-static")
    if found.descriptor.behaviour.simulator:
        return "the vendor's emulator" if found.descriptor.kind == "npu" else "SwiftShader"
    return "native"


def tried(target: str, models: Sequence[str], say: Any) -> dict[str, Any]:
    """One row: set-up, and every model that is asked for."""
    start = time.perf_counter()
    row: dict[str, Any] = {"target": target, "models": {}, "how": ""}
    try:
        found = resolve(target)
        row |= {"how": how(target), "backend": found.backend}
        say(f"{target}: setting up")
        load_backend(found.backend).setup(found.descriptor, lambda text: say(f"{target}: {text}"))
    except HalError as error:
        return {**row, "reason": error.message}
    cases = [case for case in model_cases() if case.name in models]
    for outcome in run_suite(cases, target, native=False, limit=900):
        say(f"{target}: {outcome.name} {outcome.status}")
        absent = outcome.status == NOT_RUN
        status = "built" if absent else outcome.status
        reason = f"{NOT_RUN}: {outcome.reason}" if absent else outcome.reason
        row["models"][outcome.name] = {
            "status": status, "reason": reason, "share": outcome.share,
            "max_error": outcome.max_error, "seconds": round(outcome.seconds, 1),
        }  # fmt: skip
    return {**row, "seconds": round(time.perf_counter() - start, 1)}


def cell(figures: dict[str, Any] | None) -> str:
    """Largest error and the share on the device, or why there is none."""
    if figures is None:
        return ""
    if figures["status"] == "built":
        return f"built, {figures['share']:.0%}"
    if figures["status"] == "passed":
        return f"{figures['max_error']:.1g}, {figures['share']:.0%}"
    return "refused" if figures["status"] == "unsupported" else f"**{figures['status']}**"


def page(rows: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The table as Markdown, with the reasons below."""
    measured = f"hal {facts['hal']}, {facts['date']}, on {facts['machine']} {facts['system']}."
    lines = [START, measured, "", table(rows)]
    reasons: list[str] = []
    for row in rows:
        built = [f["reason"] for f in row["models"].values() if f["status"] == "built"]
        if built:
            reasons.append(f"- `{row['target']}`: {built[0]}; {CHECKED}.")
        if "reason" in row:
            reasons.append(f"- `{row['target']}` cannot run here: {row['reason']}.")
        for name, figures in row["models"].items():
            if figures["reason"] and figures["status"] != "built":
                reasons.append(f"- `{row['target']}`, {MODELS[name]}: {figures['reason']}.")
    return "\n".join([*lines, *reasons]).rstrip() + "\n"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each target, as Markdown."""
    lines = [
        "| target | runs on | " + " | ".join(MODELS.values()) + " |",
        "|" + "---|" * (len(MODELS) + 2),
    ]
    for row in rows:
        cells = [cell(row["models"].get(name)) for name in MODELS]
        lines.append(f"| `{row['target']}` | {row['how']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def with_table(text: str, rows: Sequence[dict[str, Any]]) -> str:
    """A page whose table stands between two marks, with another table."""
    before, mark, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not mark or not end:
        raise SystemExit(f"README.md has no {' and '.join(MARKS)}")
    return f"{before}{mark}\n{table(rows)}{end}{after}"


def merged(rows: Sequence[dict[str, Any]], kept: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """New rows and cells, and those of an earlier run that were not tried again."""
    found = {row["target"]: row for row in kept}
    for row in rows:
        models = found.get(row["target"], {}).get("models", {}) if row["models"] else {}
        both = models | row["models"]
        found[row["target"]] = {**row, "models": {n: both[n] for n in MODELS if n in both}}
    order = [*TARGETS, *(name for name in found if name not in TARGETS)]
    return [found[name] for name in order if name in found]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("targets", nargs="*", help="which [all]")
    parser.add_argument("--model", action="append", choices=MODELS, help="which models [all]")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "targets.md")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks" / "results" / "targets.json"
    )
    options = parser.parse_args()
    console = Console()
    facts = {
        "hal": hal.__version__, "date": time.strftime("%Y-%m-%d"),
        "machine": platform.machine(), "system": platform.system(),
    }  # fmt: skip
    with console.status("starting") as status:
        models = options.model or list(MODELS)
        rows = [tried(target, models, status.update) for target in options.targets or TARGETS]
    if (options.targets or options.model) and options.json.exists():
        rows = merged(rows, json.loads(options.json.read_text())["rows"])
    options.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    options.page.write_text(page(rows, facts))
    options.readme.write_text(with_table(options.readme.read_text(), rows))
    console.print(f"{options.json}\n{options.page}\n{options.readme}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
