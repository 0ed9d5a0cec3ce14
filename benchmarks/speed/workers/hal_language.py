"""hal: a language model's bundle."""

from __future__ import annotations

from typing import Any

import numpy as np
import protocol


def _bring_in(options: protocol.Options) -> None:
    import hal.runtime.generate
    import hal.runtime.session

    if options["target"].endswith(":tvm"):
        import hal.targets.tvm.program
    else:
        import hal.targets.onnxruntime.backend  # noqa: F401


class Hal(protocol.LanguageModel):
    """A session that is fed as ``generate`` feeds it."""

    def __init__(self, options: protocol.Options) -> None:
        import hal
        from hal.runtime.generate import PREFILL_CHUNK

        bundle = hal.load(options["artifact"])
        self._session = bundle.session(options["target"], threads=options["threads"])
        self._chunk = PREFILL_CHUNK
        plan = self._session.plan
        self.facts: dict[str, Any] = {
            "weights_bytes": bundle.manifest.weights["bytes"],
            "cache_bytes_per_token": plan.token_bytes() if plan else None,
        }

    @property
    def parts(self) -> list[Any]:
        """What runs the segments of the build, for profiles."""
        return [part for part, _, _ in self._session.executable._parts]

    def reset(self, room: int) -> None:
        """Forget all tokens."""
        self._session.reset()

    def feed(self, ids: list[int]) -> int:
        """Run new tokens; the likeliest next one."""
        logits = None
        for at in range(0, len(ids), self._chunk):
            part = np.array([ids[at : at + self._chunk]], np.int64)
            logits = self._session.run({"input_ids": part}, logits="last")["logits"]
        assert logits is not None
        return int(logits[0, -1].argmax())


if __name__ == "__main__":
    protocol.serve(_bring_in, Hal)
