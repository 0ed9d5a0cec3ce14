"""A convolutional network for all contenders: ``network.py NAME FOLDER``; see benchmarks/cnn.py.

Writes ``model.onnx``, ``model.pt`` (its parameters), ``quantized.onnx`` (onnxruntime's own
quantizer), ``calibration.npy`` and ``image.npy``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import cnn

SIZE = 224


def main(name: str, folder: Path) -> None:
    """Make and write."""
    torch.manual_seed(0)
    model, path = cnn.MODELS[name](), folder / "model.onnx"
    cnn.export(model, path, SIZE, 100)
    torch.save(model.state_dict(), folder / "model.pt")
    given = cnn.images(cnn.CALIBRATION_IMAGES, SIZE, 0)
    samples = [{"images": given[i : i + 1]} for i in range(len(given))]
    cnn.peer_quantized(path, folder, samples).rename(folder / "quantized.onnx")
    np.save(folder / "calibration.npy", given)
    np.save(folder / "image.npy", cnn.images(1, SIZE, 1))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
