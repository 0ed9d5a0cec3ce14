"""Where hal's time goes, by kernel: ``hal_profile.py OPTIONS`` prints a line of JSON.

``host:tvm``: the virtual machine's instrument times each call of a kernel. ``host:onnxruntime``:
the runtime's own profiler, summed by kind of operator. ``rest`` is what the whole took besides:
the runtime between kernels, and Python around it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "workers"))
import protocol
from hal_language import Hal
from hal_network import HalNetwork

Request = dict[str, Any]
Spent = dict[str, float]
_SHOWN = 8


def main(options: dict[str, Any]) -> dict[str, Any]:
    """For each request the share of time by kernel, largest first."""
    profiled = _tvm if options["target"].endswith(":tvm") else _onnxruntime
    found = {}
    for key, request in options["requests"].items():
        spent, wall = profiled(options, request)
        found[key] = _shares(spent, wall)
    return found


def _shares(spent: Spent, wall: float) -> dict[str, Any]:
    ordered = sorted(spent.items(), key=lambda item: -item[1])
    top = {name: seconds / wall for name, seconds in ordered[:_SHOWN]}
    total = sum(spent.values())
    return {
        "wall_seconds": wall, "kernels": top,
        "other_kernels": total / wall - sum(top.values()), "rest": 1 - total / wall,
    }  # fmt: skip


def _model(options: dict[str, Any]) -> Hal | HalNetwork:
    return HalNetwork(options) if "image" in options else Hal(options)


def _warm(model: Hal | HalNetwork, options: dict[str, Any], request: Request) -> Request:
    """Bring the model to where the timed part begins; the request without what came before."""
    if options["first"]:
        model.answer(options["first"])
    model.answer({**request, "tokens": 2} if "context" in request else request)
    return {name: value for name, value in request.items() if name != "context"}


def _timed(model: Hal | HalNetwork, request: Request) -> float:
    start = time.perf_counter()
    model.answer(request)
    return time.perf_counter() - start


def _tvm(options: dict[str, Any], request: Request) -> tuple[Spent, float]:
    model = _model(options)
    spent: Spent = defaultdict(float)
    started: list[float] = []

    def instrument(function: Any, name: str, before: bool, result: Any, *arguments: Any) -> None:
        if before:
            started.append(time.perf_counter())
        else:
            kind = "vm.builtin.*" if name.startswith("vm.builtin.") else name
            spent[kind] += time.perf_counter() - started.pop()

    request = _warm(model, options, request)
    for part in model.parts:
        # There is no public way to the virtual machine, nor need there be one.
        if hasattr(part, "_program"):
            part._program._machine.set_instrument(instrument)
    return spent, _timed(model, request)


def _onnxruntime(options: dict[str, Any], request: Request) -> tuple[Spent, float]:
    import onnxruntime

    plain = onnxruntime.SessionOptions
    with tempfile.TemporaryDirectory() as folder:

        def profiling() -> Any:
            made = plain()
            made.enable_profiling = True
            made.profile_file_prefix = f"{folder}/profile"
            return made

        onnxruntime.SessionOptions = profiling
        try:
            model = _model(options)
        finally:
            onnxruntime.SessionOptions = plain
        request = _warm(model, options, request)
        wall = _timed(model, request)
        files = [part.session.end_profiling() for part in model.parts if hasattr(part, "session")]
        return _last_runs(json.loads(Path(files[0]).read_text()), _runs(request)), wall


def _runs(request: Request) -> int:
    """How often a request runs the session."""
    if request["do"] == "calls":
        return int(request["runs"]) + protocol.WARM
    tokens = int(request["tokens"])
    return tokens if request["do"] == "decode" else -(-tokens // protocol.CHUNK)


def _last_runs(events: list[dict[str, Any]], runs: int) -> Spent:
    """Seconds by operator in the last runs of a profile."""
    starts = sorted(event["ts"] for event in events if event.get("name") == "model_run")
    spent: Spent = defaultdict(float)
    for event in events:
        kernel = event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
        if kernel and event["ts"] >= starts[-runs]:
            spent[event["args"]["op_name"]] += event["dur"] / 1e6
    return spent


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
