"""PyTorch with transformers' own models: eager, or each step compiled by ``torch.compile``."""

from __future__ import annotations

import protocol


def _bring_in(options: protocol.Options) -> None:
    import torch
    import transformers  # noqa: F401

    torch.set_grad_enabled(False)


class Torch(protocol.LanguageModel):
    """``dtype``, ``compiled``, and ``int8``: linear layers quantized dynamically.

    Compiled steps need caches of a fixed size; eager ones grow, as ``generate`` has it.
    """

    def __init__(self, options: protocol.Options) -> None:
        import torch
        import transformers

        torch.set_num_threads(options["threads"])
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            options["artifact"], dtype=getattr(torch, options["dtype"])
        )
        self._model.train(False)
        if options.get("int8"):
            self._model = torch.ao.quantization.quantize_dynamic(
                self._model, {torch.nn.Linear}, dtype=torch.qint8
            )
        self._compiled = options.get("compiled", False)
        self._call = self._model.forward
        if self._compiled:
            self._call = torch.compile(self._call, fullgraph=True, dynamic=False)
        self._position = 0

    def reset(self, room: int) -> None:
        """A new cache."""
        import transformers

        self._position = 0
        if self._compiled:
            room = -(-room // 64) * 64
            self._cache = transformers.StaticCache(config=self._model.config, max_cache_len=room)
        else:
            self._cache = transformers.DynamicCache(config=self._model.config)

    def feed(self, ids: list[int]) -> int:
        """Run new tokens; the likeliest next one."""
        import torch

        end = self._position + len(ids)
        positions = torch.arange(self._position, end)[None]
        found = self._call(
            torch.tensor([ids]), past_key_values=self._cache, use_cache=True,
            position_ids=positions, logits_to_keep=1,
        )  # fmt: skip
        self._position = end
        return int(found.logits[0, -1].argmax())


if __name__ == "__main__":
    protocol.serve(_bring_in, Torch)
