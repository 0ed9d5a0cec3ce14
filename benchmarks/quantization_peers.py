"""Contenders that run in a Python of their own, since their packages do not go with ours.

    python -m venv peers
    peers/bin/pip install nncf openvino onnx llama-cpp-python gguf

Each script (:mod:`quantization_nncf`, :mod:`quantization_llama`) prints a line of JSON for each
model it has made, and waits for a line before it goes on.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from quantization_language import WINDOW, Done, Made, Row, Subject

HERE = Path(__file__).resolve().parent


class Versions(dict[str, str]):
    """Versions of packages, filled while contenders run."""


def nncf(
    subject: Subject, python: Path, folder: Path, versions: Versions, done: Done
) -> Iterator[Made | Row]:
    """NNCF's weight compression, run by OpenVINO with float32 activations."""
    left = [x[1:] for x in done if x[0] == "nncf"]
    export(subject.path, folder / "model.onnx")
    np.save(folder / "windows.npy", subject.windows)
    np.save(folder / "calibration.npy", subject.calibration)
    for facts in _told(python, HERE / "quantization_nncf.py", folder, versions, left):
        if "error" in facts:
            yield Row("nncf", facts["format"], facts["method"], note=facts["error"])
            continue
        found = np.load(folder / "logits.npy", mmap_mode="r")
        yield Made(
            "nncf", facts["format"], facts["method"], facts["bits"], facts["seconds"],
            lambda _, found=found: found,
        )  # fmt: skip


def llama(
    subject: Subject, python: Path, folder: Path, versions: Versions, done: Done
) -> Iterator[Made | Row]:
    """llama.cpp's formats, as float weights in our float graph."""
    left = [x[1:] for x in done if x[0] == "llama.cpp"]
    np.savez(folder / "weights.npz", **subject.matrices())
    np.savez(folder / "squares.npz", **subject.squares())
    for facts in _told(python, HERE / "quantization_llama.py", folder, versions, left):
        if "error" in facts:
            yield Row("llama.cpp", facts["format"], facts["method"], note=facts["error"])
            continue
        run = subject.with_matrices(dict(np.load(folder / "result.npz")))
        name = facts["format"] + (
            f" ({len(facts['fell_back'])} as q8_0)" * bool(facts["fell_back"])
        )
        yield Made("llama.cpp", name, facts["method"], facts["bits"], facts["seconds"], run)


def _told(
    python: Path, script: Path, folder: Path, versions: Versions, done: Sequence[tuple[str, ...]]
) -> Iterator[dict[str, Any]]:
    """What the script says, one model after the other, but for those that are done."""
    (folder / "done.json").write_text(json.dumps(done))
    with (folder / f"{script.stem}.log").open("w") as log:
        process = subprocess.Popen(
            [str(python), str(script), str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith("{"):  # these packages also print
                continue
            facts = json.loads(line)
            versions.update(facts.pop("versions", {}))
            if facts:
                yield facts
            process.stdin.write("\n")
            process.stdin.flush()
        if process.wait():
            raise SystemExit(f"{script.name} failed; its messages: {log.name}")


class _Logits(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def export(source: Path, path: Path) -> None:
    """The checkpoint as ONNX in standard operators, for one window, nothing seen before."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, attn_implementation="eager", dtype=torch.float32
    )
    model.train(False)
    program = torch.onnx.export(
        _Logits(model), (torch.zeros(1, WINDOW, dtype=torch.long),), dynamo=True, opset_version=18,
        input_names=["input_ids"], output_names=["logits"], verbose=False,
    )  # fmt: skip
    program.save(path)
