"""OpenVINO's runtime by itself: a stateful model, precisions as it chooses unless told."""

from __future__ import annotations

import numpy as np
import protocol


def _bring_in(options: protocol.Options) -> None:
    import openvino  # noqa: F401


class OpenVino(protocol.LanguageModel):
    """``properties`` go to the compiler as they are."""

    def __init__(self, options: protocol.Options) -> None:
        import openvino

        properties = {
            "INFERENCE_NUM_THREADS": options["threads"],
            "PERFORMANCE_HINT": "LATENCY",
            **options.get("properties", {}),
        }
        model = openvino.Core().read_model(f"{options['artifact']}/openvino_model.xml")
        compiled = openvino.Core().compile_model(model, "CPU", properties)
        self._request = compiled.create_infer_request()
        self._inputs = {port.get_any_name() for port in compiled.inputs}
        self._past = 0
        told = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION")
        self.facts = {name: str(compiled.get_property(name)) for name in told}

    def reset(self, room: int) -> None:
        """Forget all tokens."""
        self._request.reset_state()
        self._past = 0

    def feed(self, ids: list[int]) -> int:
        """Run new tokens; the likeliest next one."""
        end = self._past + len(ids)
        feeds = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(self._past, end, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        given = {name: array for name, array in feeds.items() if name in self._inputs}
        self._request.infer(given, share_inputs=True)
        self._past = end
        return int(self._request.get_tensor("logits").data[0, -1].argmax())


if __name__ == "__main__":
    protocol.serve(_bring_in, OpenVino)
