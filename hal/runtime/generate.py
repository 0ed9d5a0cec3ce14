"""Autoregressive generation on a session that carries its state."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from hal.errors import InputError
from hal.runtime.tokenizer import TextStream, Tokenizer

if TYPE_CHECKING:
    from hal.runtime.session import Session


class Generated:
    """An iterator over what is generated, token by token.

    ``token_ids`` holds the ids so far (prompt excluded); ``seconds_to_first_token`` and ``seconds``
    are measured on the wall clock. ``text()`` runs to the end and joins the pieces.
    """

    def __init__(self, steps: Iterator[int], stream: TextStream | None) -> None:
        self._steps = steps
        self._stream = stream
        self._start = time.perf_counter()
        self.token_ids: list[int] = []
        self.seconds_to_first_token: float | None = None
        self.seconds = 0.0
        self._flushed = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            token = next(self._steps)
        except StopIteration:
            if self._stream is not None and not self._flushed:
                self._flushed = True
                rest = self._stream.flush()
                if rest:
                    return rest
            raise
        self.seconds = time.perf_counter() - self._start
        if self.seconds_to_first_token is None:
            self.seconds_to_first_token = self.seconds
        self.token_ids.append(token)
        return token if self._stream is None else self._stream.push(token)

    def text(self) -> str:
        """Run to the end and return the generated text (for a text prompt)."""
        return "".join(str(piece) for piece in self)


def generate(
    session: Session,
    prompt: str | list[int] | np.ndarray,
    *,
    max_new_tokens: int = 64,
    stop_token_ids: list[int] | None = None,
) -> Generated:
    """Greedy continuation of one prompt, from position 0.

    Args:
        session: a session of a model with task ``causal-lm``; its state is reset first.
        prompt: text (needs a tokenizer in the bundle) or token ids.
        max_new_tokens: upper limit of generated tokens.
        stop_token_ids: ids that end the generation; default: the model's end-of-sequence ids.

    Returns:
        An iterator: pieces of text for a text prompt, token ids otherwise.

    Raises:
        InputError: not a language model, an empty prompt, or ids outside the vocabulary.
    """
    metadata = session.bundle.manifest.metadata
    if session.bundle.manifest.task != "causal-lm":
        raise InputError(
            f"the bundle's task is {session.bundle.manifest.task!r}, not 'causal-lm'",
            "generation needs a language model with carried state",
        )
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}", "ask for at least one token")
    stream = None
    if isinstance(prompt, str):
        tokenizer = Tokenizer.from_bundle(session.bundle.files)
        ids = tokenizer.encode(_valid_text(prompt))
        stream = TextStream(tokenizer, ids)
    else:
        ids = _valid_ids(prompt)
    if not ids:
        raise InputError("the prompt is empty", "give at least one token")
    vocabulary = metadata.get("vocab_size")
    if vocabulary and not all(0 <= i < vocabulary for i in ids):
        raise InputError(
            f"the prompt has token ids outside 0..{vocabulary - 1}", "use the model's own tokenizer"
        )
    stops = set(metadata.get("eos_token_ids", []) if stop_token_ids is None else stop_token_ids)
    return Generated(_greedy(session, ids, max_new_tokens, stops), stream)


def _valid_text(prompt: str) -> str:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the prompt is not valid Unicode: {error.reason}", "remove lone surrogates"
        ) from error
    return prompt


def _valid_ids(prompt: object) -> list[int]:
    array = np.asarray(prompt)
    if array.size and (array.dtype.kind not in "iu" or array.ndim > 2):
        raise InputError(
            f"the prompt is neither text nor token ids but {type(prompt).__name__} "
            f"of {array.dtype}",
            "pass a string or a list of integers",
        )
    if array.ndim == 2 and len(array) > 1:
        raise InputError(f"{len(array)} prompts are given at once", "generate one prompt at a time")
    return [int(i) for i in array.reshape(-1)]


def _greedy(session: Session, ids: list[int], limit: int, stops: set[int]) -> Iterator[int]:
    session.reset()
    name = session.inputs[0].name
    step = np.array([ids], np.int64)
    for _ in range(limit):
        token = int(session.run({name: step})["logits"][0, -1].argmax())
        yield token
        if token in stops:
            return
        step = np.array([[token]], np.int64)
