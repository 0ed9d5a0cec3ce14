"""OpenVINO's runtime on an ONNX file or one of its own."""

from __future__ import annotations

import numpy as np
import protocol


def _bring_in(options: protocol.Options) -> None:
    import openvino  # noqa: F401


def _load(options: protocol.Options) -> protocol.Caller:
    import openvino

    properties = {
        "INFERENCE_NUM_THREADS": options["threads"],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(options["artifact"]), "CPU", properties)
    request, image = compiled.create_infer_request(), np.load(options["image"])
    return protocol.Caller(lambda: request.infer({"images": image}, share_inputs=True))


if __name__ == "__main__":
    protocol.serve(_bring_in, _load)
