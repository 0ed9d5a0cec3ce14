"""Sentence embeddings from a text encoder: the mean of the last hidden states, normalized."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hal.errors import InputError
from hal.runtime.engine import EngineBusy
from hal.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from hal.runtime.session import Session

HIDDEN = "last_hidden_state"
_INPUTS = {"input_ids", "attention_mask", "token_type_ids"}
_BATCH = 32


class Embedder:
    """Embeds texts, from any thread, one call after the other.

    Args:
        session: of a text encoder; nobody else uses it.
        max_waiting: most calls that wait for their turn.

    Raises:
        InputError: the model is no text encoder, or has no tokenizer.
    """

    def __init__(self, session: Session, *, max_waiting: int = 256) -> None:
        names = {spec.name for spec in session.inputs}
        outputs = {spec.name for spec in session.outputs}
        if not names <= _INPUTS or "input_ids" not in names or HIDDEN not in outputs:
            raise InputError(
                f"the model (task {session.bundle.manifest.task!r}) gives no embeddings of texts",
                f"embeddings need a text encoder with an output {HIDDEN!r}",
            )
        self.session = session
        self.texts = self.tokens = 0
        self._names = names
        self._tokenizer = Tokenizer.from_bundle(session.bundle.files)
        self._positions = session.bundle.manifest.metadata.get("max_positions")
        self._vocabulary = session.bundle.manifest.metadata.get("vocab_size")
        self._turn, self._books = threading.Lock(), threading.Lock()
        self._waiting, self._max_waiting = 0, max_waiting

    def embed(self, texts: Sequence[str | Sequence[int]]) -> tuple[np.ndarray, int]:
        """Embed texts, or token ids.

        Returns:
            float32 ``[len(texts), width]``, each row of length 1; and the tokens of all texts.

        Raises:
            EngineBusy: too many calls are waiting.
            InputError: a text is empty, is longer than the model's positions or has ids outside
                its vocabulary.
        """
        rows = [self._ids(index, text) for index, text in enumerate(texts)]
        with self._books:
            if self._waiting >= self._max_waiting:
                raise EngineBusy(f"{self._waiting} calls are waiting", "try again in a second")
            self._waiting += 1
        try:
            with self._turn:
                parts = [self._run(rows[at : at + _BATCH]) for at in range(0, len(rows), _BATCH)]
        finally:
            with self._books:
                self._waiting -= 1
        tokens = sum(map(len, rows))
        with self._books:
            self.texts, self.tokens = self.texts + len(rows), self.tokens + tokens
        return np.concatenate(parts), tokens

    def _ids(self, index: int, text: str | Sequence[int]) -> list[int]:
        if isinstance(text, str):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InputError(
                    f"input {index} is not valid Unicode: {error.reason}", "remove lone surrogates"
                ) from None
        ids = self._tokenizer.encode(text) if isinstance(text, str) else list(text)
        if not text or not ids:
            raise InputError(f"input {index} is empty", "give at least one character")
        if self._vocabulary and not all(0 <= i < self._vocabulary for i in ids):
            raise InputError(
                f"input {index} has ids outside 0..{self._vocabulary - 1}",
                "use the model's own tokenizer",
            )
        if self._positions and len(ids) > self._positions:
            raise InputError(
                f"input {index} has {len(ids)} tokens, the model has {self._positions} positions",
                "split the text",
            )
        return ids

    def _run(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        width = max(map(len, rows))
        arrays = {name: np.zeros((len(rows), width), np.int64) for name in _INPUTS}
        for index, ids in enumerate(rows):
            arrays["input_ids"][index, : len(ids)] = ids
            arrays["attention_mask"][index, : len(ids)] = 1
        inputs = {name: arrays[name] for name in self._names}
        mask = arrays["attention_mask"][..., None].astype(np.float32)
        hidden = np.asarray(self.session.run(inputs)[HIDDEN], np.float32)
        mean = (hidden * mask).sum(1) / mask.sum(1)
        unit: np.ndarray = mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)
        return unit
