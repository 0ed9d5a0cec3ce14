"""From module to loaded session: hal against ``torch.onnx.export`` + ``InferenceSession``.

::

    python benchmarks/compile_time.py                      # 0.6 B parameters, fp32, random weights
    python benchmarks/compile_time.py --layers 4 --rounds 1

Each measurement is a process of its own; the two ways take turns, so that a busy machine slows both
alike, and medians are compared; processor time is given too, which others' work disturbs less.
Peak memory is the process's largest resident set (the module itself included) as a multiple of the
weights. Loading is measured on the bundle that hal wrote.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SHAPES = {
    "qwen3-0.6b": {
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }
}
PROMPT = 8


def module(layers: int | None) -> Any:
    """A language model of a real shape with random weights, in eval mode."""
    import torch
    import transformers

    torch.manual_seed(0)
    shape = {**SHAPES["qwen3-0.6b"], **({"num_hidden_layers": layers} if layers else {})}
    config = transformers.Qwen3Config(**shape)
    config._attn_implementation = "sdpa"
    return transformers.Qwen3ForCausalLM(config).eval()


def weight_bytes(model: Any) -> int:
    """Bytes of the parameters, shared ones once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


# -- what is measured; each runs in its own process -------------------------------------------


def with_hal(folder: Path, layers: int | None, verify: bool) -> dict[str, Any]:
    """``hal.compile`` to a bundle on disk, and a session on it."""
    import hal

    model = module(layers)
    stages: list[tuple[str, float]] = []
    start, cpu = time.perf_counter(), time.process_time()

    def progress(text: str) -> None:
        stages.append((text, time.perf_counter() - start))

    bundle = hal.compile(
        model,
        target="host:onnxruntime",
        output=folder / "model.hal",
        verify=verify,
        progress=progress,
    )
    progress("publishing and checking the bundle is done; loading the session")
    session = bundle.session()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    report = {**_measured(model, seconds, cpu), "stages": _durations(stages, seconds)}
    session.run({"input_ids": _ids()})
    return report


def with_torch(folder: Path, layers: int | None, verify: bool) -> dict[str, Any]:
    """``torch.onnx.export`` to a file, and a session on it."""
    import onnxruntime as ort
    import torch

    model = module(layers)
    start, cpu = time.perf_counter(), time.process_time()
    path = folder / "model.onnx"
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    torch.onnx.export(
        model,
        (torch.from_numpy(_ids()),),
        path,
        dynamo=True,
        kwargs={"use_cache": False},
        input_names=["input_ids"],
        output_names=["logits"],
        dynamic_shapes={"input_ids": dims, "use_cache": None},
        verbose=False,
    )
    exported = time.perf_counter() - start
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    stages = {"torch.onnx.export": exported, "InferenceSession": seconds - exported}
    report = {**_measured(model, seconds, cpu), "stages": stages}
    session.run(None, {"input_ids": _ids()})
    return report


def loading(folder: Path, layers: int | None, verify: bool) -> dict[str, Any]:
    """``hal.load`` and a session, then one call; memory before, between and after."""
    import hal

    before = _memory()
    start = time.perf_counter()
    bundle = hal.load(folder / "model.hal")
    opened = time.perf_counter() - start
    session = bundle.session()
    seconds = time.perf_counter() - start
    loaded = _memory()
    session.run({"input_ids": _ids()})
    return {
        "seconds": seconds,
        "stages": {"hal.load (digests)": opened, "session": seconds - opened},
        "weights": bundle.manifest.weights["bytes"],
        "before": before,
        "loaded": loaded,
        "after_one_call": _memory(),
    }


def _ids() -> Any:
    import numpy as np

    return np.arange(1, PROMPT + 1, dtype=np.int64)[None]


def _measured(model: Any, seconds: float, cpu: float) -> dict[str, Any]:
    weights = weight_bytes(model)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    times = {"seconds": seconds, "cpu_seconds": cpu}
    return {**times, "weights": weights, "peak": peak, "ratio": peak / weights}


def _durations(stages: list[tuple[str, float]], total: float) -> dict[str, float]:
    ends = [at for _, at in stages[1:]] + [total]
    return {name: end - at for (name, at), end in zip(stages, ends, strict=True)}


def _memory() -> dict[str, int]:
    """Resident bytes of this process: private (``anonymous``) and mapped from files."""
    fields = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, value, *_ = line.split()
        fields[name.rstrip(":")] = int(value) * 1024
    return {"anonymous": fields["Anonymous"], "file": fields["Rss"] - fields["Anonymous"]}


# -- rounds and report ------------------------------------------------------------------------

Measurement = Callable[[Path, int | None, bool], dict[str, Any]]


def in_process(measure: Measurement, *arguments: Any) -> dict[str, Any]:
    """Run a measurement in a fresh interpreter.

    Raises:
        RuntimeError: the process failed.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, measure, arguments))
    process.start()
    sender.close()
    try:
        result: dict[str, Any] = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{measure.__name__} failed with {process.exitcode}") from None
    process.join()
    return result


def _child(sender: Any, measure: Measurement, arguments: tuple[Any, ...]) -> None:
    warnings.simplefilter("ignore")
    os.environ["HAL_CACHE"] = str(arguments[0] / "cache")
    sender.send(measure(*arguments))


def run(rounds: int, layers: int | None, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Take turns between the ways; returns every measurement."""
    ways: dict[str, tuple[Measurement, bool]] = {
        "torch": (with_torch, False),
        "hal": (with_hal, False),
        "hal, verified": (with_hal, True),
    }
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in [*ways, "loading"]}
    for turn in range(rounds):
        for name, (measure, verify) in ways.items():
            place = folder / f"{turn}-{measure.__name__}-{verify}"
            place.mkdir()
            row = in_process(measure, place, layers, verify)
            results[name].append(row)
            print(
                f"{name}: {row['seconds']:.0f} s, peak {row.get('ratio', 0):.2f} x weights",
                flush=True,
            )
            if measure is with_hal and not verify:
                results["loading"].append(in_process(loading, place, layers, verify))
            shutil.rmtree(place)
    return results


def report(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians, and hal's time as a multiple of torch's."""
    median = statistics.median
    figures: dict[str, Any] = {}
    for name, rows in results.items():
        keys = rows[0]["stages"]
        figures[name] = {
            "seconds": median(row["seconds"] for row in rows),
            "stages": {key: round(median(row["stages"][key] for row in rows), 2) for key in keys},
            "weights_gb": rows[0]["weights"] / 1e9,
        }
        if "peak" in rows[0]:
            figures[name]["cpu_seconds"] = median(row["cpu_seconds"] for row in rows)
            figures[name]["peak_multiple"] = median(row["ratio"] for row in rows)
    row = results["loading"][0]
    weights = row["weights"]
    figures["loading"]["resident_multiple"] = {
        when: {kind: round(row[when][kind] / weights, 3) for kind in ("anonymous", "file")}
        for when in ("before", "loaded", "after_one_call")
    }
    for unit, name in (("seconds", "time_multiple"), ("cpu_seconds", "cpu_time_multiple")):
        base = figures["torch"][unit]
        figures[name] = figures["hal"][unit] / base
        figures[f"{name}_verified"] = figures["hal, verified"][unit] / base
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Compile time and memory against torch.onnx.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, help="fewer layers than the real shape has")
    parser.add_argument("--folder", type=Path, help="where to work (needs 10 GB)")
    parser.add_argument("--json", type=Path, help="write figures and measurements to this file")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="compile-time-", dir=options.folder) as name:
        results = run(options.rounds, options.layers, Path(name))
    figures = report(results)
    print(json.dumps(figures, indent=1))
    if options.json:
        options.json.write_text(json.dumps({**figures, "measurements": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
