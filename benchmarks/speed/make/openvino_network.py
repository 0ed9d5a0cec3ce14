"""NNCF's post-training quantization of an ONNX file: ``openvino_network.py ONNX OUTPUT IMAGES``."""

from __future__ import annotations

import sys
from pathlib import Path

import nncf
import numpy as np
import openvino


def main(source: str, output: Path, images: str) -> None:
    """Quantize on the images and write ``model.xml``."""
    given = np.load(images)
    data = nncf.Dataset([{"images": given[i : i + 1]} for i in range(len(given))])
    model = openvino.Core().read_model(source)
    openvino.save_model(nncf.quantize(model, data, subset_size=len(given)), output / "model.xml")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
