"""A session without a model: logits that depend on the two latest tokens, computed in numpy.

It keeps the promises of the real one that generation relies on: a state that is carried on, that can
be cut back and reset, and rows of different lengths.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from hal.runtime.picks import Logits, last_of

BYTES = 256
END = 256
VOCABULARY = 257


def byte_tokenizer() -> str:
    """A ``tokenizer.json`` with one token per byte: id 97 is ``a``; and an end token."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # The byte-level alphabet maps printable bytes to themselves and moves the others up.
    plain = [c for c in sorted(alphabet) if ord(c) < BYTES]
    moved = iter(c for c in sorted(alphabet) if ord(c) >= BYTES)
    vocabulary = {chr(b) if chr(b) in plain else next(moved): b for b in range(BYTES)}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|end|>"])
    return str(inner.to_str())


class FakeSession:
    """Tokens follow from ``follows``; what is not in there from a hash of the two latest ids.

    Args:
        script: text that the model repeats for ever, greedily; None: hashed logits.
        metadata: facts of the model in addition to the usual.
        files: members of the bundle.
    """

    capacity = 0
    step_extents = None

    def __init__(
        self, script: str | None = None, files: Mapping[str, bytes] | None = None, **metadata: Any
    ) -> None:
        facts = {"vocab_size": VOCABULARY, "eos_token_ids": [END], **metadata}
        self.bundle = types.SimpleNamespace(
            manifest=types.SimpleNamespace(task="causal-lm", metadata=facts),
            files=Files({"tokenizer/tokenizer.json": byte_tokenizer().encode(), **(files or {})}),
        )
        self.inputs = (types.SimpleNamespace(name="input_ids"),)
        self.states = (types.SimpleNamespace(name="0.key"),)
        self.plan: Any = types.SimpleNamespace(
            ragged=True, pools=(types.SimpleNamespace(state="0.key"),)
        )
        self.script = None if script is None else list(script.encode())
        self.rows: list[list[int]] = []
        self.prompt = 0
        self.calls: list[Any] = []

    @property
    def position(self) -> int:
        return max(map(len, self.rows), default=0)

    def reset(self) -> None:
        self.rows = []

    def trim(self, length: int) -> None:
        assert 0 <= length <= self.position
        self.rows = [row[:length] for row in self.rows]

    def run(
        self,
        inputs: Mapping[str, Any],
        lengths: Sequence[int] | None = None,
        logits: Logits = "all",
    ) -> dict[str, np.ndarray]:
        ids = np.asarray(inputs["input_ids"])
        counts = [ids.shape[1]] * len(ids) if lengths is None else list(lengths)
        self.calls.append(counts)
        self.rows = self.rows or [[] for _ in ids]
        assert len(self.rows) == len(ids)
        result = np.full((*ids.shape, VOCABULARY), np.nan, np.float32)
        for index, row in enumerate(self.rows):
            for at in range(counts[index]):
                row.append(int(ids[index, at]))
                result[index, at] = self._logits(row)
        return {"logits": last_of(result, counts) if logits == "last" else result}

    def _logits(self, row: list[int]) -> np.ndarray:
        noise = np.random.default_rng(row[-2:]).normal(0, 1, VOCABULARY).astype(np.float32)
        if self.script is not None:
            noise[self.script[(len(row) - self.prompt) % len(self.script)]] += 100
        return noise


class OneRowSession(FakeSession):
    """A session whose state is carried by value: no rows of different lengths."""

    def __init__(self, script: str | None = None) -> None:
        super().__init__(script)
        self.plan = None

    def run(
        self,
        inputs: Mapping[str, Any],
        lengths: Sequence[int] | None = None,
        logits: Logits = "all",
    ) -> dict[str, np.ndarray]:
        assert lengths is None
        return super().run(inputs, logits=logits)


class Files(dict[str, bytes]):
    """The members of a bundle, in memory."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def read(self, name: str) -> bytes:
        return self[name]
