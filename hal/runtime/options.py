"""The options of generation, checked before anything runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from hal.errors import InputError, did_you_mean
from hal.runtime.chat import is_messages
from hal.runtime.decoding import Rules
from hal.runtime.grammar import checked_grammar
from hal.runtime.sampling import SamplingOptions
from hal.runtime.stopping import checked_stops


@dataclasses.dataclass(frozen=True)
class GenerationOptions:
    """The options of :func:`hal.runtime.generate.generate`, checked; see there.

    Raises:
        InputError: a value is out of its range; the text names the option and the range.
    """

    max_new_tokens: int = 64
    temperature: float | None = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    stop: str | Sequence[str] | None = None
    stop_token_ids: int | Sequence[int] | None = None
    seed: int | None = None
    prefill_chunk: int | None = None
    prompt_lookup: int | None = None
    as_text: bool | None = None
    response_format: Mapping[str, Any] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        whole_number("max_new_tokens", self.max_new_tokens, 1)
        if self.seed is not None:
            whole_number("seed", self.seed, 0)
        if self.prefill_chunk is not None:
            whole_number("prefill_chunk", self.prefill_chunk, 1)
        if self.prompt_lookup is not None:
            whole_number("prompt_lookup", self.prompt_lookup, 0)
        if self.as_text not in (None, True, False):
            raise InputError(f"as_text is {self.as_text!r}", "as_text is True, False or None")
        checked_grammar(self.response_format, self.grammar)
        checked_stops(self.stop)
        _ = self.sampling
        if self.stop_token_ids is not None:
            _stop_ids(self.stop_token_ids)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> GenerationOptions:
        """Options by name.

        Raises:
            InputError: there is no option of that name, or a value is out of its range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        check_names(options, known)
        return cls(**options)

    @property
    def sampling(self) -> SamplingOptions:
        """Those that say how a token is chosen."""
        return SamplingOptions(
            self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty
        )

    @property
    def constrained(self) -> bool:
        """Whether the text has to keep to a grammar."""
        return checked_grammar(self.response_format, self.grammar) is not None

    def gives_text(self, prompt: object) -> bool:
        """Whether what a prompt is continued with is given as text."""
        return is_text(prompt) if self.as_text is None else self.as_text

    def rules(
        self, metadata: Mapping[str, Any], prompt_tokens: int, capacity: int = 0
    ) -> Rules:  # fmt: skip
        """What a continuation of ``prompt_tokens`` goes by, on a model with these facts.

        ``capacity``: positions that the build has room for, 0: no limit.

        Raises:
            InputError: the prompt leaves no room for a token within the model's positions or the
                build's, or a stop token is not in the vocabulary.
        """
        limit = self.max_new_tokens
        rooms = {"the model": metadata.get("max_positions"), "this build": capacity}
        for who, positions in rooms.items():
            if not positions:
                continue
            if prompt_tokens >= positions:
                raise InputError(
                    f"the prompt has {prompt_tokens} tokens; {who} has {positions} positions, "
                    "and at least one is for the continuation",
                    f"shorten the prompt to at most {positions - 1} tokens"
                    + (", or compile with more room (--dim)" if positions == capacity else ""),
                )
            limit = min(limit, positions - prompt_tokens)
        if self.stop_token_ids is None:
            ended = _stop_ids(metadata.get("eos_token_ids", []))
        else:
            ended = _stop_ids(self.stop_token_ids)
            _check_vocabulary(ended, metadata.get("vocab_size"))
        return Rules(limit, self.sampling, self.seed, checked_stops(self.stop), ended)


def check_names(options: Iterable[str], known: Iterable[str]) -> None:
    """Refuse options that there are not.

    Raises:
        InputError: there is no option of that name.
    """
    known = list(known)
    for name in options:
        if name not in known:
            raise InputError(f"no generation option {name!r}", did_you_mean(name, known))


def is_text(prompt: object) -> bool:
    """Whether a prompt is text or the messages of a chat, rather than token ids."""
    return isinstance(prompt, str) or is_messages(prompt)


def _stop_ids(value: Any) -> frozenset[int]:
    listed = isinstance(value, (list, tuple, set, frozenset, np.ndarray))
    several: list[Any] = list(value) if listed else [value]
    good = all(isinstance(i, (int, np.integer)) and not isinstance(i, bool) for i in several)
    if not good:
        raise InputError(
            f"stop_token_ids is {value!r}", "stop_token_ids is a token id or a list of them"
        )
    return frozenset(int(i) for i in several)


def _check_vocabulary(ids: frozenset[int], size: int | None) -> None:
    wrong = sorted(i for i in ids if not 0 <= i < size) if size else []
    if size and wrong:
        raise InputError(
            f"stop_token_ids has {wrong[0]}, the vocabulary is 0..{size - 1}",
            "use the ids of the model's own tokenizer",
        )


def whole_number(name: str, value: Any, least: int) -> None:
    """Refuse what is no whole number from ``least``.

    Raises:
        InputError: it is none; names the option.
    """
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or value < least:
        raise InputError(f"{name} is {value!r}", f"{name} is a whole number from {least}")
