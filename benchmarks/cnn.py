"""Convolutional networks in 8 bits: speed beside floats and beside ONNX Runtime's own quantizer.

::

    python examples/train_digits.py --output digits
    python benchmarks/cnn.py --digits digits --json results.json

Speed is that of networks shaped like ResNet-18 and MobileNetV2 with random weights (their batch
normalizations have seen random images, so that activations are of usual size). Contenders take
turns, one call each; the median of all rounds counts. ``cosine`` is that of the results to the
float model's on images that calibration has not seen. Accuracy is that of a network that was
trained on scikit-learn's digits. ONNX Runtime's quantizer gets the float model as its own
``quant_pre_process`` leaves it, the same images, and scales by channel.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from rich.console import Console
from rich.table import Table
from torch import nn

import hal

CALIBRATION_IMAGES = 16
TEST_IMAGES = 8
DIGIT_FORMATS = (
    "w8a8", "w8a8-static", "w8a16", "w8a16,conv=w4a16", "w8a16,conv=w4a16-asym",
)  # fmt: skip

Run = Callable[[dict[str, np.ndarray]], np.ndarray]


class Residual(nn.Module):
    """Two convolutions of 3 x 3 around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(inputs, outputs, 3, stride),
            nn.ReLU(),
            *_convolution(outputs, outputs, 3),
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Sequential(*([] if same else _convolution(inputs, outputs, 1, stride)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``relu(body(x) + shortcut(x))``."""
        return torch.relu(self.body(x) + self.shortcut(x))


class Inverted(nn.Module):
    """Widen, convolve each channel by itself, narrow again."""

    def __init__(self, inputs: int, outputs: int, stride: int, wider: int) -> None:
        super().__init__()
        inner = inputs * wider
        widen = [] if wider == 1 else [*_convolution(inputs, inner, 1), nn.ReLU6()]
        self.body = nn.Sequential(
            *widen,
            *_convolution(inner, inner, 3, stride, inner),
            nn.ReLU6(),
            *_convolution(inner, outputs, 1),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``body(x)``, with x added where it fits."""
        return x + self.body(x) if self.residual else self.body(x)


def _convolution(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(outputs)]


def _head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)]


def resnet18() -> nn.Module:
    """11.7 M parameters, 1.8 G multiply-adds at 224 x 224."""
    layers = [*_convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Residual(channels, outputs, stride), Residual(outputs, outputs, 1)]
        channels = outputs
    return nn.Sequential(*layers, *_head(channels))


def mobilenet_v2() -> nn.Module:
    """3.5 M parameters, 0.3 G multiply-adds at 224 x 224."""
    layers = [*_convolution(3, 32, 3, 2), nn.ReLU6()]
    channels = 32
    blocks = (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
        (6, 320, 1, 1),
    )  # fmt: skip
    for wider, outputs, count, stride in blocks:
        for index in range(count):
            layers.append(Inverted(channels, outputs, 1 if index else stride, wider))
            channels = outputs
    return nn.Sequential(*layers, *_convolution(channels, 1280, 1), nn.ReLU6(), *_head(1280))


MODELS = {"ResNet-18-like": resnet18, "MobileNetV2-like": mobilenet_v2}


def images(count: int, size: int, seed: int) -> np.ndarray:
    """Random images with structure at several scales, float32 ``[count, 3, size, size]``."""
    rng = np.random.default_rng(seed)
    total = np.zeros((count, 3, size, size), np.float32)
    for cells in (4, 16, 64, size):
        coarse = torch.from_numpy(rng.standard_normal((count, 3, cells, cells), np.float32))
        total += nn.functional.interpolate(coarse, (size, size), mode="bilinear").numpy()
    return total


def export(model: nn.Module, path: Path, size: int, seed: int) -> None:
    """Set the statistics of batch normalization, and write the float model."""
    model.train()
    with torch.no_grad():
        for step in range(8):
            model(torch.from_numpy(images(4, size, seed + step)))
    model.train(False)
    program = torch.onnx.export(
        model, (torch.zeros(1, 3, size, size),), dynamo=True, opset_version=20, verbose=False,
        input_names=["images"], output_names=["scores"],
    )  # fmt: skip
    program.save(path)


class Reader(CalibrationDataReader):
    """Arrays by input name, one call each."""

    def __init__(self, samples: Sequence[dict[str, np.ndarray]]) -> None:
        self._samples: Iterator[dict[str, np.ndarray]] = iter(samples)

    def get_next(self) -> Any:
        """The next call's inputs, or None."""
        return next(self._samples, None)


def peer_quantized(path: Path, folder: Path, samples: Sequence[dict[str, np.ndarray]]) -> Path:
    """The model as ONNX Runtime's own quantizer makes it."""
    prepared, result = folder / "prepared.onnx", folder / "peer.onnx"
    quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared), str(result), Reader(samples), per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return result


def peer_run(path: Path, threads: int) -> Run:
    """ONNX Runtime by itself."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda inputs: np.asarray(session.run(None, inputs)[0])


def hal_run(bundle: hal.Bundle, threads: int) -> Run:
    """A bundle's session."""
    session = bundle.session(threads=threads)
    return lambda inputs: np.asarray(next(iter(session.run(inputs).values())))


def contenders(
    path: Path, folder: Path, samples: Sequence[dict[str, np.ndarray]], threads: int
) -> tuple[dict[str, Run], dict[str, float]]:
    """Runs by name, and the seconds that quantizing took."""
    target = "host:onnxruntime"
    floats = hal.compile(path, target=target, output=folder / "float")
    start = time.perf_counter()
    whole = hal.compile(
        path, target=target, output=folder / "w8a8", quantize="w8a8", calibration=list(samples)
    )
    seconds = {"hal w8a8": time.perf_counter() - start}
    start = time.perf_counter()
    peer = peer_quantized(path, folder, samples)
    seconds["onnxruntime quantize_static"] = time.perf_counter() - start
    return {
        "hal float32": hal_run(floats, threads),
        "hal w8a8": hal_run(whole, threads),
        "onnxruntime float32": peer_run(path, threads),
        "onnxruntime quantize_static": peer_run(peer, threads),
    }, seconds


def timed(runs: dict[str, Run], sample: dict[str, np.ndarray], rounds: int) -> dict[str, Any]:
    """Milliseconds of each, taking turns."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run(sample)
            if round_ >= 2:
                found[name].append(1e3 * (time.perf_counter() - start))
    return {n: {"median_ms": float(np.median(t)), "min_ms": min(t)} for n, t in found.items()}


def speed(name: str, size: int, rounds: int, threads: int) -> list[dict[str, Any]]:
    """Rows of one network."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        path = folder / "model.onnx"
        export(MODELS[name](), path, size, 100)
        given = images(CALIBRATION_IMAGES, size, 0)
        samples = [{"images": given[i : i + 1]} for i in range(len(given))]
        runs, seconds = contenders(path, folder, samples, threads)
        test = images(TEST_IMAGES, size, 1)
        right = [runs["onnxruntime float32"]({"images": test[i : i + 1]}) for i in range(len(test))]
        times = timed(runs, {"images": test[:1]}, rounds)
        rows = []
        for who, run in runs.items():
            found = [run({"images": test[i : i + 1]}) for i in range(len(test))]
            pairs = list(zip(right, found, strict=True))
            cosine = np.mean(
                [np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]
            )
            rows.append(
                {"model": name, "who": who, **times[who], "cosine": float(cosine),
                 "speedup": times["hal float32"]["median_ms"] / times[who]["median_ms"],
                 "quantizing_s": seconds.get(who)}
            )  # fmt: skip
    return rows


def accuracy(folder: Path) -> list[dict[str, Any]]:
    """Share of digits that are read right, for each format that applies."""
    path = folder / "digits.onnx"
    test, labels = np.load(folder / "test.npz")["images"], np.load(folder / "labels.npy")
    given = np.load(folder / "calibration.npz")["images"]

    def row(who: str, run: Run) -> dict[str, Any]:
        right = run({"images": test}).argmax(1) == labels
        return {"who": who, "accuracy": float(right.mean()), "right": int(right.sum())}

    rows = []
    with tempfile.TemporaryDirectory() as made:
        floats = hal.compile(path, target="host:onnxruntime", output=Path(made) / "float")
        rows.append(row("float32", hal_run(floats, 1)))
        for number, recipe in enumerate(DIGIT_FORMATS):
            bundle = hal.compile(
                path, target="host:onnxruntime", output=Path(made) / str(number), quantize=recipe,
                calibration=folder / "calibration.npz",
            )  # fmt: skip
            bits = bundle.manifest.metadata["quantization"]["bits_per_weight"]
            rows.append({**row(recipe, hal_run(bundle, 1)), "bits": bits})
        samples = [{"images": part} for part in np.array_split(given, 8)]
        peer = peer_quantized(path, Path(made), samples)
        rows.append(row("onnxruntime quantize_static", peer_run(peer, 1)))
    return rows


def show(console: Console, title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as a table."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*names, title=title)
    for row in rows:
        values = (row.get(name) for name in names)
        table.add_row(
            *("" if v is None else f"{v:.5g}" if isinstance(v, float) else str(v) for v in values)
        )
    console.print(table)


def main() -> None:
    """Measure, print, and write what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--size", type=int, default=224, help="height and width of images")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--digits", type=Path, help="what examples/train_digits.py wrote")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console()
    rows = []
    for name in MODELS:
        rows += speed(name, options.size, options.rounds, options.threads)
    show(console, f"{options.threads} thread(s)", rows)
    digits = accuracy(options.digits) if options.digits else []
    if digits:
        show(console, "digits", digits)
    if options.json:
        result = {
            "threads": options.threads, "size": options.size, "load": os.getloadavg()[0],
            "onnxruntime": ort.__version__, "speed": rows, "digits": digits,
        }  # fmt: skip
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
