"""onnxruntime by itself."""

from __future__ import annotations

import numpy as np
import protocol


def _bring_in(options: protocol.Options) -> None:
    import onnxruntime  # noqa: F401


def _load(options: protocol.Options) -> protocol.Caller:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options["threads"]
    session = onnxruntime.InferenceSession(
        options["artifact"], settings, providers=["CPUExecutionProvider"]
    )
    image = np.load(options["image"])
    return protocol.Caller(lambda: session.run(None, {"images": image}))


if __name__ == "__main__":
    protocol.serve(_bring_in, _load)
