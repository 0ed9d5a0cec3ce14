"""``hal.compile`` with the options of a JSON text: ``hal_bundle.py SOURCE OUTPUT OPTIONS``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

import hal


def main(source: Path, output: Path, text: str) -> None:
    """Compile; examples to calibrate on come from a ``.npy`` of images."""
    options = json.loads(text)
    if "calibration" in options:
        images = np.load(options["calibration"])
        options["calibration"] = [{"images": images[i : i + 1]} for i in range(len(images))]
    dtype = options.pop("dtype", None)
    hal.compile(_in_dtype(source, dtype) if dtype else source, output=output, **options)


def _in_dtype(source: Path, dtype: str) -> Any:
    """The checkpoint as a module: the way that keeps its dtype."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    return model.eval()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
