"""Autoregressive generation on a session that carries its state.

::

    steps = generate(session, "The for statement", max_new_tokens=32, temperature=0.8, seed=1)
    for piece in steps:
        print(piece, end="", flush=True)
    print(steps.finish_reason, steps.stats())
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hal.errors import InputError
from hal.runtime.chat import ChatTemplate, Message
from hal.runtime.decoding import (
    Continuation,
    Counts,
    FinishReason,
    decode,
    decode_batch,
    run_ids,
)
from hal.runtime.grammar import Grammar, checked_grammar
from hal.runtime.options import GenerationOptions, check_names, is_text, whole_number
from hal.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from hal.runtime.session import Session

Prompt = str | Sequence[int] | np.ndarray | Sequence[Message]
"""Text, token ids, or the messages of a chat."""

PREFILL_CHUNK = 512
"""Prompt tokens in one run by default: bounds memory, and keeps the products large."""


class Generated:
    """An iterator over what is generated, one item for each token.

    For a text or a chat the items are pieces of text. A piece may be empty: a character can take
    several tokens, and what may be the beginning of a stop string is held back. For a prompt of
    ids the items are token ids.

    Attributes:
        prompt_ids: the prompt's tokens.
        token_ids: the tokens so far, prompt excluded, a final stop token included.
        finish_reason: None until the end; then ``"stop"`` (a stop string or stop token came) or
            ``"length"`` (``max_new_tokens``, or the model's last position).
        seconds_to_first_token: the time that the prompt took, None before.
        seconds: time spent generating so far; the caller's own between two items is not counted.
        counts: tokens that were reused, guessed, and kept of the guesses.
    """

    def __init__(
        self, row: Continuation, steps: Iterator[tuple[int, str]], text: bool, counts: Counts
    ) -> None:
        self._row = row
        self._steps = steps
        self._text = text
        self.counts = counts
        self.seconds_to_first_token: float | None = None
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        start = time.perf_counter()
        token, text = next(self._steps)
        self.seconds += time.perf_counter() - start
        if self.seconds_to_first_token is None:
            self.seconds_to_first_token = self.seconds
        return text if self._text else token

    @property
    def prompt_ids(self) -> list[int]:
        """Token ids of the prompt."""
        return self._row.prompt_ids

    @property
    def token_ids(self) -> list[int]:
        """Token ids generated so far."""
        return self._row.token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended; None before."""
        return self._row.finish_reason

    @property
    def held_ids(self) -> list[int]:
        """The ids that the session's state holds: all but the last one, which was never run."""
        return [*self.prompt_ids, *self.token_ids][:-1]

    def text(self) -> str:
        """Run to the end and return the generated text (for a text prompt)."""
        return "".join(str(piece) for piece in self)

    def stats(self) -> dict[str, Any]:
        """Figures so far.

        Returns:
            ``prompt_tokens``, ``reused_tokens`` (those of them that the state held already),
            ``new_tokens``, ``prefill_seconds``, ``decode_seconds`` (after the first token),
            ``prefill_tokens_per_second`` (of those that were run), ``decode_tokens_per_second``,
            ``finish_reason``, ``guessed_tokens`` and ``guessed_tokens_kept``; None where nothing
            was measured.
        """
        first = self.seconds_to_first_token
        later = None if first is None else self.seconds - first
        return {
            "prompt_tokens": len(self.prompt_ids),
            "reused_tokens": self.counts.reused,
            "new_tokens": len(self.token_ids),
            "prefill_seconds": first,
            "decode_seconds": later,
            "prefill_tokens_per_second": _rate(len(self.prompt_ids) - self.counts.reused, first),
            "decode_tokens_per_second": _rate(len(self.token_ids) - 1, later),
            "finish_reason": self.finish_reason,
            "guessed_tokens": self.counts.guessed,
            "guessed_tokens_kept": self.counts.kept,
        }


@dataclasses.dataclass(frozen=True)
class Completion:
    """What one prompt of a batch was continued with.

    Attributes:
        prompt_tokens: length of the prompt.
        token_ids: generated tokens, a final stop token included.
        text: their text without a stop string; None for a prompt of ids unless ``as_text``.
        finish_reason: ``"stop"`` or ``"length"``, as for :class:`Generated`.
        seconds: from the start of the batch to this prompt's last token.
    """

    prompt_tokens: int
    token_ids: list[int]
    text: str | None
    finish_reason: FinishReason
    seconds: float


def generate(
    session: Session,
    prompt: Prompt,
    *,
    max_new_tokens: int = 64,
    temperature: float | None = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: str | Sequence[str] | None = None,
    stop_token_ids: int | Sequence[int] | None = None,
    seed: int | None = None,
    prefill_chunk: int | None = None,
    prompt_lookup: int | None = None,
    as_text: bool | None = None,
    response_format: Mapping[str, Any] | None = None,
    grammar: str | None = None,
    held: Sequence[int] | np.ndarray = (),
    **unknown: Any,
) -> Generated:
    """Continue one prompt.

    Args:
        session: a session of a model with task ``causal-lm``; its state is reset when the first
            item is asked for.
        prompt: text; or messages of a chat, ``[{"role": "user", "content": "…"}]``, for the model's
            own chat template; or token ids, a list or an integer array [n] or [1, n]. The first
            two need a tokenizer in the bundle.
        max_new_tokens: most tokens to generate. The model's last position ends it as well.
        temperature: divides the logits before a draw; 0 or None: no draw, the best token.
        top_k: draw from the k most likely tokens only.
        top_p: draw from the fewest tokens whose probabilities sum to this.
        min_p: draw from tokens at least this fraction as likely as the best one.
        repetition_penalty: makes tokens that occurred less likely, if above 1. The meaning of
            these five is that of transformers; see :mod:`hal.runtime.sampling`.
        stop: a string or strings that end the text and are no part of it (needs a tokenizer). One
            that never comes is no error.
        stop_token_ids: ids that end it; default: the model's end-of-sequence ids, ``[]``: none.
        seed: of the draw; None: different each time.
        prefill_chunk: prompt tokens in one run; default 512. Has no influence on the result.
        prompt_lookup: guess up to this many tokens ahead from what the context said before, and
            check them in one run. Has no influence on the result; pays for text that repeats.
        as_text: whether the items are text (needs a tokenizer) or ids; default: as the prompt is.
        response_format: what the text has to be: ``{"type": "json_object"}``, or ``{"type":
            "json_schema", "json_schema": {"schema": {…}}}``, as in OpenAI's interface. Needs the
            extra ``[grammar]`` and a tokenizer in the bundle.
        grammar: the same as a grammar in Lark's syntax, instead.
        held: ids that the session's state holds already (:attr:`Generated.held_ids` of what was
            generated before); the beginning that they share with the prompt is not run again.
        unknown: refused.

    Returns:
        An iterator: token ids for a prompt of ids unless ``as_text``, pieces of text otherwise.

    Raises:
        InputError: not a language model, an option that there is not or that is out of its range
            (named, with the range), an empty prompt, one that leaves no room within the model's
            positions, ids outside the vocabulary, text without a tokenizer in the bundle, or
            messages without a chat template or such that the template refuses.
        MissingExtraError: a grammar is given and the extra is not installed.
    """
    check_names(unknown, [*(f.name for f in dataclasses.fields(GenerationOptions)), "held"])
    options = GenerationOptions(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop,
        stop_token_ids=stop_token_ids,
        seed=seed,
        prefill_chunk=prefill_chunk,
        prompt_lookup=prompt_lookup,
        as_text=as_text,
        response_format=response_format,
        grammar=grammar,
    )
    check_language_model(session)
    held = _held_ids(held)
    row = continuation(session, prompt, options, _tokenizer(session, options, [prompt]), 0)
    counts = Counts()
    chunk = options.prefill_chunk or PREFILL_CHUNK
    steps = decode(session, row, chunk=chunk, draft=prompt_lookup or 0, held=held, counts=counts)
    return Generated(row, steps, options.gives_text(prompt), counts)


def generate_batch(session: Session, prompts: Iterable[Prompt], **options: Any) -> list[Completion]:
    """Continue several prompts, which may differ in length.

    The rows of a batch are independent: each gets the tokens that it would get alone. With a seed,
    row ``i`` draws from its own sequence (row 0 like :func:`generate` with that seed).

    Args:
        session: a session of a language model; its state is reset.
        prompts: texts, lists of ids, or lists of messages.
        options: those of :func:`generate` but ``held``; ``prompt_lookup`` has to be left out.

    Returns:
        One completion for each prompt, in order.

    Raises:
        InputError: see :func:`generate`; also no prompts at all. Names the prompt by its index.
    """
    chosen = GenerationOptions.of(options)
    check_language_model(session)
    if chosen.prompt_lookup:
        raise InputError(
            "prompt_lookup is given for a batch", "it works for one prompt: use generate()"
        )
    if isinstance(prompts, str):
        raise InputError("prompts is one text", "pass a list of prompts, or use generate()")
    given: Any = prompts
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        raise InputError(f"prompts is a {type(prompts).__name__}", "pass a list of prompts")
    listed = list(prompts)
    if not listed:
        raise InputError("the batch is empty", "give at least one prompt")
    tokenizer = _tokenizer(session, chosen, listed)
    rows = []
    for index, prompt in enumerate(listed):
        try:
            rows.append(continuation(session, prompt, chosen, tokenizer, index))
        except InputError as error:
            raise InputError(f"prompt {index}: {error.message}", error.hint) from None
    seconds = [0.0] * len(rows)
    start = time.perf_counter()
    texts: list[list[str]] = [[] for _ in rows]
    for index, text in decode_batch(session, rows, chunk=chosen.prefill_chunk or PREFILL_CHUNK):
        seconds[index] = time.perf_counter() - start
        texts[index].append(text)
    return [
        Completion(
            len(row.prompt_ids),
            row.token_ids,
            "".join(texts[index]) if chosen.gives_text(listed[index]) else None,
            row.finish_reason or "length",
            seconds[index],
        )
        for index, row in enumerate(rows)
    ]


def teacher_forced_logits(
    session: Session, ids: Sequence[int] | np.ndarray, chunk: int = PREFILL_CHUNK
) -> np.ndarray:
    """Logits at every position of a given text, for scoring.

    Args:
        session: a session of a language model; its state is reset first.
        ids: token ids: a list, or an integer array [n] or [1, n].
        chunk: tokens in one run.

    Returns:
        float32 [len(ids), vocab]; row ``i`` is about the token after ``ids[i]``.

    Raises:
        InputError: not a language model, no ids, ids outside the vocabulary, or more of them than
            the model has positions.
    """
    check_language_model(session)
    whole_number("chunk", chunk, 1)
    metadata = session.bundle.manifest.metadata
    listed = _checked_ids(ids, metadata)
    positions = metadata.get("max_positions")
    rooms = {"the model": positions, "this build": session.capacity}
    for who, room in rooms.items():
        if room and len(listed) > room:
            raise InputError(
                f"{len(listed)} tokens are given, {who} has {room} positions",
                "score the text in windows",
            )
    session.reset()
    parts = [run_ids(session, listed[at : at + chunk]) for at in range(0, len(listed), chunk)]
    return np.concatenate(parts).astype(np.float32, copy=False)


def check_language_model(session: Session) -> None:
    """Refuse a session that generates nothing.

    Raises:
        InputError: its model is no language model.
    """
    task = session.bundle.manifest.task
    if task != "causal-lm":
        raise InputError(
            f"the bundle's task is {task!r}, not 'causal-lm'",
            "generation needs a language model with carried state",
        )


def _tokenizer(
    session: Session, options: GenerationOptions, prompts: Sequence[object]
) -> Tokenizer | None:
    """The bundle's tokenizer if something needs one."""
    needed = options.stop or options.constrained
    if needed or any(options.gives_text(p) or is_text(p) for p in prompts):
        return Tokenizer.from_bundle(session.bundle.files)
    return None


def continuation(
    session: Session,
    prompt: object,
    options: GenerationOptions,
    tokenizer: Tokenizer | None,
    row: int,
) -> Continuation:
    """What decides about one prompt; ``row`` is which of several with the same options it is.

    Raises:
        InputError, MissingExtraError: see :func:`generate`.
    """
    metadata = session.bundle.manifest.metadata
    if tokenizer is not None and is_text(prompt):
        prompt = _encoded(session, prompt, tokenizer)
    ids = _checked_ids(prompt, metadata)
    rules = options.rules(metadata, len(ids), session.capacity)
    constraint = None
    text = checked_grammar(options.response_format, options.grammar)
    if text is not None and tokenizer is not None:
        size = metadata.get("vocab_size")
        constraint = Grammar(text, tokenizer, rules.stop_token_ids, size)
    return Continuation(ids, rules, tokenizer, constraint, row)


def _encoded(session: Session, prompt: Any, tokenizer: Tokenizer) -> list[int]:
    """Token ids of a text or of the messages of a chat."""
    if isinstance(prompt, str):
        return tokenizer.encode(_valid_text(prompt))
    template = ChatTemplate.from_bundle(session.bundle.files)
    return tokenizer.encode(_valid_text(template.render(prompt)), add_special_tokens=False)


def _checked_ids(prompt: object, metadata: Mapping[str, Any]) -> list[int]:
    ids = _valid_ids(prompt)
    if not ids:
        raise InputError("the prompt is empty", "give at least one token")
    size = metadata.get("vocab_size")
    if size:
        wrong = [i for i in ids if not 0 <= i < size]
        if wrong:
            raise InputError(
                f"the prompt has token ids outside 0..{size - 1}: {wrong[0]}",
                "use the model's own tokenizer",
            )
    return ids


def _valid_text(prompt: str) -> str:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the prompt is not valid Unicode: {error.reason}", "remove lone surrogates"
        ) from error
    return prompt


def _valid_ids(prompt: object) -> list[int]:
    hint = "pass a string or a list of integers; for several prompts use generate_batch()"
    try:
        array = np.asarray(prompt)
    except ValueError:
        raise InputError("the prompt is a list of lists that differ in length", hint) from None
    if array.size and (array.dtype.kind not in "iu" or not 1 <= array.ndim <= 2):
        raise InputError(
            f"the prompt is neither text nor token ids but {type(prompt).__name__} "
            f"of {array.dtype}",
            hint,
        )
    if array.ndim == 2 and len(array) > 1:
        raise InputError(f"{len(array)} prompts are given at once", hint)
    return [int(i) for i in array.reshape(-1)]


def _held_ids(held: Any) -> list[int]:
    try:
        array = np.asarray(held)
    except ValueError:
        array = np.empty((), object)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InputError(
            f"held is no list of token ids but {type(held).__name__}",
            "pass held_ids of what was generated before",
        )
    return [int(i) for i in array]


def _rate(count: int, seconds: float | None) -> float | None:
    return count / seconds if seconds and count > 0 else None
