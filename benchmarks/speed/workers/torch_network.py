"""PyTorch: eager with channels last, ``torch.compile`` with frozen weights, or static int8."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import protocol

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for benchmarks/cnn.py


def _bring_in(options: protocol.Options) -> None:
    import torch

    torch.set_grad_enabled(False)


def _load(options: protocol.Options) -> protocol.Caller:
    import cnn
    import torch

    torch.set_num_threads(options["threads"])
    model = cnn.MODELS[options["network"]]()
    model.load_state_dict(torch.load(options["artifact"], weights_only=True))
    model.train(False)
    image = torch.from_numpy(np.load(options["image"]))
    if options.get("int8"):
        model = _quantized(model, image, options["calibration"])
    if not options.get("compiled"):
        model = model.to(memory_format=torch.channels_last)
        image = image.to(memory_format=torch.channels_last)
        return protocol.Caller(lambda: model(image))
    import torch._inductor.config

    torch._inductor.config.freezing = True
    compiled = torch.compile(model)
    compiled(image)
    return protocol.Caller(lambda: compiled(image))


def _quantized(model: Any, image: Any, calibration: str) -> Any:
    """As PyTorch's own graph mode does it: observed on the images, with its engine for x86."""
    import torch
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    engine = "x86" if "x86" in torch.backends.quantized.supported_engines else "qnnpack"
    torch.backends.quantized.engine = engine
    observed = prepare_fx(model, get_default_qconfig_mapping(engine), (image,))
    given = torch.from_numpy(np.load(calibration))
    for i in range(len(given)):
        observed(given[i : i + 1])
    return convert_fx(observed)


if __name__ == "__main__":
    protocol.serve(_bring_in, _load)
