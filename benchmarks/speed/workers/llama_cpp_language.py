"""llama.cpp through its C interface: weights mapped, graph and cache as it chooses."""

from __future__ import annotations

import ctypes

import numpy as np
import protocol

_TYPES = {"f16": 1, "q8_0": 8}
"""Numbers of ggml's types for caches."""
_BATCH = 1024


def _bring_in(options: protocol.Options) -> None:
    import llama_cpp  # noqa: F401


class LlamaCpp(protocol.LanguageModel):
    """``room``: positions that the cache is made for; ``cache``: the type of its numbers."""

    def __init__(self, options: protocol.Options) -> None:
        import llama_cpp

        self._api = llama_cpp
        llama_cpp.llama_backend_init()
        given = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(options["artifact"].encode(), given)
        if not self._model:
            raise RuntimeError("llama.cpp cannot load the file; its log says why")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_batch = options["room"], _BATCH
        context.n_threads = context.n_threads_batch = options["threads"]
        if "cache" in options:
            context.type_k = context.type_v = _TYPES[options["cache"]]
        self._context = llama_cpp.llama_init_from_model(self._model, context)
        if not self._context:
            raise RuntimeError("llama.cpp cannot make a context; its log says why")
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._words = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def reset(self, room: int) -> None:
        """Forget all tokens."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def feed(self, ids: list[int]) -> int:
        """Run new tokens; the likeliest next one."""
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        batch = self._api.llama_batch_get_one(tokens, len(ids))
        if self._api.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode failed on {len(ids)} tokens")
        logits = self._api.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self._words,)).argmax())


if __name__ == "__main__":
    protocol.serve(_bring_in, LlamaCpp)
