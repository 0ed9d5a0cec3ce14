"""OpenVINO GenAI's pipeline; it does not stop between tokens, so its own clock is read.

The pipeline keeps the prefix of earlier prompts, so every prompt that is timed is a new one; a
long context that is held is given again with each command and comes from there.
"""

from __future__ import annotations

import numpy as np
import protocol


def _bring_in(options: protocol.Options) -> None:
    import openvino_genai  # noqa: F401


class Pipeline:
    """``LLMPipeline`` with greedy search and no end before the wanted number of tokens."""

    def __init__(self, options: protocol.Options) -> None:
        import openvino_genai

        self._pipeline = openvino_genai.LLMPipeline(
            options["artifact"], "CPU", INFERENCE_NUM_THREADS=options["threads"],
            PERFORMANCE_HINT="LATENCY", **options.get("properties", {}),
        )  # fmt: skip
        self._held: list[int] = []
        self._calls = 0

    def answer(self, request: protocol.Options) -> protocol.Answer:
        """Do what a command says."""
        do = request["do"]
        self._calls += 1
        seed = request.get("seed", 0) * 1000 + self._calls
        if do == "hold":
            self._held = protocol.prompt(request["context"], request["seed"])
            self._generate(self._held, 1)
            return {}
        if do == "prefill":
            ids = protocol.prompt(request["tokens"], seed)
            first, _, foreign = self._generate(ids, 1)
            return {"seconds": [first], "foreign": foreign}
        if do == "decode":
            count = request["tokens"]
            ids = protocol.prompt(request["context"], seed) if "context" in request else self._held
            _, each, foreign = self._generate(ids, count + 1)
            return {"seconds": [each] * count, "foreign": foreign}
        raise ValueError(f"a language model has no command {do!r}")

    def _generate(self, ids: list[int], new: int) -> tuple[float, float, float | None]:
        """Seconds to the first token, of each further one, and what others took of it all."""
        import openvino
        import openvino_genai

        options = openvino_genai.GenerationConfig()
        options.max_new_tokens, options.ignore_eos, options.do_sample = new, True, False
        array = np.array([ids], np.int64)
        tokens = openvino_genai.TokenizedInputs(
            openvino.Tensor(array), openvino.Tensor(np.ones_like(array))
        )
        with protocol.Region() as region:
            metrics = self._pipeline.generate(tokens, options).perf_metrics
        each = metrics.get_tpot().mean / 1e3 if new > 1 else 0.0
        return metrics.get_ttft().mean / 1e3, each, region.foreign


if __name__ == "__main__":
    protocol.serve(_bring_in, Pipeline)
