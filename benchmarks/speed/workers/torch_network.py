"""PyTorch: eager with channels last, or ``torch.compile`` with frozen weights."""

from __future__ import annotations

import sys
from pathlib import Path

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
    if not options.get("compiled"):
        model = model.to(memory_format=torch.channels_last)
        image = image.to(memory_format=torch.channels_last)
        return protocol.Caller(lambda: model(image))
    import torch._inductor.config

    torch._inductor.config.freezing = True
    compiled = torch.compile(model)
    compiled(image)
    return protocol.Caller(lambda: compiled(image))


if __name__ == "__main__":
    protocol.serve(_bring_in, _load)
