"""Decode speed of a language-model bundle over the length of its context, and over its batch.

::

    python benchmarks/decode.py MODEL.hal --target host:tvm --target host:onnxruntime
    python benchmarks/decode.py MODEL.hal --context 16,8192 --batch 1,8 --json out.json

The context is made of random keys and values put into the session's state, so a long one costs no
prefill. Contenders are interleaved in every round; figures are medians. Beside the measured time
stands what a token must read: the weights once, and each row's cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import hal


def fill(session: hal.Session, rows: int, tokens: int) -> None:
    """Give the session ``rows`` rows that have seen ``tokens`` tokens."""
    session.reset()
    rng = np.random.default_rng(0)
    specs = {s["name"]: s for s in session.bundle.manifest.state}
    states = {}
    for item in session.states:
        dims = specs[item.name]["dims"]
        shape = [
            tokens if axis == item.growth_axis else dim
            for axis, dim in enumerate(dims)
            if item.axes[axis] != "batch"
        ]
        states[item.name] = (rng.standard_normal(shape, np.float32), 0)
    for _ in range(rows):
        session.add_row(tokens, states)


def step_seconds(session: hal.Session, rows: int, steps: int) -> list[float]:
    """Seconds of each of ``steps`` decode steps of all rows."""
    ids = np.full((rows, 1), 5, np.int64)
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        session.run({session.inputs[0].name: ids})
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All combinations, interleaved; one row for each."""
    bundle = hal.load(arguments.bundle)
    weights = bundle.manifest.weights["bytes"]
    layouts = [item or None for item in arguments.layout.split(",")]
    sessions = {
        (t, layout): bundle.session(t, kv_layout=layout)
        for t in arguments.target or bundle.targets
        for layout in layouts
    }
    cases = [(key, c, b) for b in arguments.batch for c in arguments.context for key in sessions]
    seconds: dict[Any, list[float]] = {case: [] for case in cases}
    for session in sessions.values():  # A route may load weights anew for batches.
        fill(session, max(arguments.batch), 16)
        step_seconds(session, max(arguments.batch), 10)
    for _ in range(arguments.rounds):
        for case in cases:
            key, context, batch = case
            fill(sessions[key], batch, context)
            step_seconds(sessions[key], batch, 2)
            seconds[case] += step_seconds(sessions[key], batch, arguments.steps)
            sessions[key].reset()
    rows = []
    for (key, context, batch), times in seconds.items():
        plan = sessions[key].plan
        cache = (plan.token_bytes() if plan else 0) * context * batch
        median = statistics.median(times)
        rows.append(
            {
                "target": key[0],
                "layout": plan.layout if plan else "by value",
                "context": context,
                "batch": batch,
                "ms_per_step": median * 1e3,
                "tokens_per_second": batch / median,
                "cache_mib": cache / 2**20,
                "gb_per_second": (weights + cache) / median / 1e9,
            }
        )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--target", action="append")
    numbers = lambda text: [int(n) for n in text.split(",")]  # noqa: E731
    parser.add_argument("--context", type=numbers, default=[16, 1024, 4096, 8192])
    parser.add_argument("--batch", type=numbers, default=[1])
    parser.add_argument("--layout", default="", help="contiguous,paged; default: the build's own")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = measure(arguments)
    machine = {"cpu": platform.processor(), "cores": len(os.sched_getaffinity(0))}
    table = Table(title=f"{arguments.bundle}, {machine['cores']} cores, hal {hal.__version__}")
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{v:.1f}" if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
