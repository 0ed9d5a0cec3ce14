"""What each format and method costs in accuracy, beside the quantizers of other projects.

::

    python examples/train_reference_model.py            # once; it takes an hour and is cached
    python examples/train_digits.py --output digits     # seconds
    python benchmarks/quantization.py --model ~/.cache/hal/models/reference --digits digits \
        --peers peers/bin/python --output benchmarks/results

Every row of the language model is the same float model with the weights of its linear layers (not
embedding and head) in few bits, on the same held-out tokens. Bits are those of these layers as they
are stored, scales and zero points included. ONNX Runtime's quantizers run here; NNCF and llama.cpp
in the Python that ``--peers`` names (:mod:`quantization_peers` says what it needs). A sentence
encoder and a network for digits are judged by what they are for. ``quantization.json`` gets
everything, ``quantization.md`` what matters (:mod:`quantization_report`).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import logging
import os
import platform
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import cnn
import numpy as np
import onnxruntime as ort
import quantization_encoder
import quantization_peers
import quantization_report
import torch
import transformers
from quantization_language import WINDOW, Made, Row, Subject, onnxruntime_quantizer, ours
from rich.console import Console

import hal

METHODS = ("rtn", "hqq", "awq", "gptq", "gptq+rotate")
"""What is tried with every format; ``smooth`` where activations are rounded as well."""

FORMATS = (
    "w8a16", "w8a16-channel", "w8a8", "w8a8-channel", "fp8", "fp8-channel", "w4a16-g16", "w4a16",
    "w4a16-asym", "w4a16-g64", "w4a16-g64-asym", "w4a16-channel", "w4a8", "mxfp4", "w3a16",
    "w3a16-g64", "w3a16-g64-asym", "w2a16-g16", "w2a16", "w2a16-asym", "w2a16-g64", "w2a16-g256",
    "ternary",
)  # fmt: skip


def recipes() -> list[str]:
    """Every format with each of its methods."""
    return [
        f"{name}:{method}"
        for name in FORMATS
        for method in (*METHODS, *(["smooth"] if "a8" in name else []))
    ]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    return {"processor": model, "cores": os.cpu_count(), "system": platform.system()}


def language(
    options: argparse.Namespace, versions: dict[str, str], console: Console
) -> tuple[list[Row], dict[str, Any]]:
    """Rows of the language model, and facts about it."""
    with console.status("exporting the model"):
        subject = Subject(options.model, options.tokens, options.calibration)
    facts = {
        "parameters": sum(x.size for x in subject.layers),
        "tokens": subject.windows.size,
        "calibration": subject.calibration.size,
        "window": WINDOW,
        "perplexity": _perplexity(subject),
    }
    kept = options.output / "language.jsonl" if options.output else None
    rows = _kept(kept) if kept and options.resume else []
    done = {(r.who, r.format, r.method) for r in rows}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        sources: list[Iterable[Made | Row]] = [onnxruntime_quantizer(subject, done)]
        if options.peers:
            sources.append(quantization_peers.llama(subject, options.peers, folder, versions, done))
            sources.append(quantization_peers.nncf(subject, options.peers, folder, versions, done))
        sources.append(ours(subject, options.recipes, done))
        for found in _each(sources):
            row = found if isinstance(found, Row) else subject.score(found)
            rows.append(row)
            if kept:
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text("".join(f"{json.dumps(dataclasses.asdict(r))}\n" for r in rows))
            console.print(
                f"{row.who} {row.format}:{row.method} {row.bits:.3f} bits: "
                + (row.note or f"KL {row.kl:.3g}, top-1 {row.top1:.2%}, {row.perplexity:.4f}x")
            )
    return rows, facts


def _kept(path: Path) -> list[Row]:
    """Rows that an interrupted run has left."""
    return [Row(**json.loads(x)) for x in path.read_text().splitlines()] if path.exists() else []


def _each(sources: Iterable[Iterable[Made | Row]]) -> Iterator[Made | Row]:
    for source in sources:
        yield from source


def _perplexity(subject: Subject) -> float:
    rows = subject.reference.astype(np.float64)
    losses = (
        np.log(np.exp(rows).sum(-1))
        - np.take_along_axis(rows, subject.goals[..., None], -1)[..., 0]
    )
    return float(np.exp(losses.mean()))


def main() -> None:
    """Measure everything, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face directory")
    parser.add_argument("--tokens", type=int, default=4096, help="held-out tokens to score")
    parser.add_argument("--calibration", type=int, default=8192, help="tokens to calibrate on")
    parser.add_argument("--recipes", type=lambda s: s.split(","), default=recipes())
    parser.add_argument("--peers", type=Path, help="the Python that has NNCF and llama.cpp")
    parser.add_argument("--digits", type=Path, help="what examples/train_digits.py wrote")
    parser.add_argument("--no-encoder", action="store_true")
    parser.add_argument("--resume", action="store_true", help="take rows that are in --output")
    parser.add_argument("--output", type=Path, help="folder for quantization.json and .md")
    options = parser.parse_args()
    logging.getLogger("onnx_ir").setLevel(logging.WARNING)
    console = Console()
    versions = {
        "hal": hal.__version__, "onnxruntime": ort.__version__, "torch": torch.__version__,
        "transformers": transformers.__version__,
    }  # fmt: skip
    rows, facts = language(options, versions, console)
    encoder = [] if options.no_encoder else quantization_encoder.measure(console.print)
    digits = cnn.accuracy(options.digits) if options.digits else []
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions,
        "language": {**facts, "rows": [dataclasses.asdict(r) for r in rows]},
        "encoder": encoder,
        "digits": digits,
    }
    text = quantization_report.markdown(result)
    console.print(text, markup=False)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        path = options.output / "quantization.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        path.with_suffix(".md").write_text(text)
        (options.output / "language.jsonl").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
