"""onnxruntime-genai: a generator over a model that its builder made."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import protocol


def _bring_in(options: protocol.Options) -> None:
    import onnxruntime_genai  # noqa: F401


class Genai(protocol.LanguageModel):
    """The number of threads is read from the model's folder, so it is written there first."""

    def __init__(self, options: protocol.Options) -> None:
        import onnxruntime_genai

        settings = Path(options["artifact"]) / "genai_config.json"
        read = json.loads(settings.read_text())
        session = read["model"]["decoder"]["session_options"]
        if session.get("intra_op_num_threads") != options["threads"]:
            session["intra_op_num_threads"] = options["threads"]
            settings.write_text(json.dumps(read, indent=1))
        self._api = onnxruntime_genai
        self._model = onnxruntime_genai.Model(options["artifact"])
        self._generator = None

    def reset(self, room: int) -> None:
        """A new generator: that is how its users start again."""
        given = self._api.GeneratorParams(self._model)
        given.set_search_options(do_sample=False, max_length=room + 1, min_length=room + 1)
        self._generator = self._api.Generator(self._model, given)

    def feed(self, ids: list[int]) -> int:
        """Run new tokens; the likeliest next one.

        A single token is the one that it chose itself, and is not given again.
        """
        if len(ids) > 1:
            self._append(ids)
        return self._choose()

    def _hold(self, context: int, room: int, seed: int) -> int:
        """As its base has it, but choosing only once: each choice is a token more."""
        ids = protocol.prompt(context, seed)
        self.reset(room)
        for at in range(0, context, protocol.CHUNK):
            self._append(ids[at : at + protocol.CHUNK])
        return self._choose()

    def _append(self, ids: list[int]) -> None:
        assert self._generator is not None
        self._generator.append_tokens(np.array(ids, np.int32))

    def _choose(self) -> int:
        assert self._generator is not None
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])


if __name__ == "__main__":
    protocol.serve(_bring_in, Genai)
