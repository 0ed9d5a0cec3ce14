"""The loop of generation: prompts in chunks, then a token at a time, for one sequence or several.

A :class:`Continuation` decides (which token, which text, whether to stop) and never runs anything;
:func:`decode` and :func:`decode_batch` run the session and decide nothing. A server that steps
many sequences together uses the former with a loop of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from hal.errors import HalError, InputError
from hal.runtime.lookup import PromptLookup
from hal.runtime.picks import Logits
from hal.runtime.sampling import Sampler, SamplingOptions
from hal.runtime.stopping import StopStrings
from hal.runtime.tokenizer import TextStream, Tokenizer

if TYPE_CHECKING:
    from hal.runtime.session import Session

FinishReason = Literal["stop", "length"]
GREEDY = SamplingOptions()


class Constraint(Protocol):
    """Says which tokens may come next, and when the text is complete."""

    @property
    def finished(self) -> bool:
        """Whether nothing may follow."""

    def allowed(self, size: int) -> np.ndarray:
        """Which tokens may come next: bool [size], of a vocabulary of that size."""

    def accept(self, token: int) -> None:
        """Go on by a token."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """What a continuation goes by, apart from its prompt.

    Attributes:
        limit: most tokens to generate, at least 1.
        sampling: how a token is chosen.
        seed: of the draw; None: different each time.
        stops: strings that end the text.
        stop_token_ids: tokens that end it; they are counted but give no text.
    """

    limit: int
    sampling: SamplingOptions = GREEDY
    seed: int | None = None
    stops: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()


class Continuation:
    """One sequence while it grows: give it logits, it chooses the token.

    Attributes:
        prompt_ids: the prompt, unchanged.
        token_ids: the tokens chosen so far, one that ended the text included.
        finish_reason: None while it goes on; ``"stop"`` (a stop token or string) or ``"length"``.

    Args:
        prompt_ids: token ids, at least one.
        rules: see :class:`Rules`.
        tokenizer: gives text; None: no text, and no stop strings.
        constraint: what the text must be; None: anything.
        row: which sequence of a batch this is, for the draw.
    """

    def __init__(
        self,
        prompt_ids: list[int],
        rules: Rules,
        tokenizer: Tokenizer | None = None,
        constraint: Constraint | None = None,
        row: int = 0,
    ) -> None:
        self.prompt_ids = prompt_ids
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._rules = rules
        self._ids = list(prompt_ids)
        self._sampler = Sampler(rules.sampling, rules.seed, row)
        self._stream = None if tokenizer is None else TextStream(tokenizer, prompt_ids)
        self._stopping = StopStrings(rules.stops)
        self._constraint = constraint

    def accept(self, logits: np.ndarray) -> tuple[int, str]:
        """Choose the next token.

        Args:
            logits: floating [vocab], of the last token.

        Returns:
            The token, and the text that is certain now (often empty, always so without a
            tokenizer).

        Raises:
            InputError: the logits are not finite.
        """
        allowed = None if self._constraint is None else self._constraint.allowed(len(logits))
        token = self._sampler.pick(logits, self._ids, allowed)
        self.token_ids.append(token)
        self._ids.append(token)
        text = ""
        if token in self._rules.stop_token_ids:
            self.finish_reason = "stop"
        else:
            text = self._text(token)
        if self._constraint is not None and self.finish_reason is None:
            self._constraint.accept(token)
            if self._constraint.finished:
                self.finish_reason = "stop"
        if self.finish_reason is None and len(self.token_ids) >= self._rules.limit:
            self.finish_reason = "length"
        if self.finish_reason is not None and self._stream is not None:
            text += self._stopping.push(self._stream.flush()) + self._stopping.flush()
        return token, text

    def _text(self, token: int) -> str:
        if self._stream is None:
            return ""
        text = self._stopping.push(self._stream.push(token))
        if self._stopping.stopped:
            self.finish_reason = "stop"
        return text

    @property
    def finished(self) -> bool:
        """Whether no more tokens are to come."""
        return self.finish_reason is not None

    @property
    def room(self) -> int:
        """Tokens that may still be chosen."""
        return self._rules.limit - len(self.token_ids)


@dataclasses.dataclass
class Counts:
    """Tokens that were not run one by one.

    Attributes:
        reused: tokens of the prompt that the state held already.
        guessed: tokens that were guessed by prompt look-up and run.
        kept: those of them that the model agreed with.
    """

    reused: int = 0
    guessed: int = 0
    kept: int = 0


def decode(
    session: Session,
    row: Continuation,
    *,
    chunk: int,
    draft: int = 0,
    held: Sequence[int] = (),
    counts: Counts | None = None,
) -> Iterator[tuple[int, str]]:
    """Run a session until the continuation ends, from position 0.

    Args:
        session: its state is reset when the first item is asked for.
        row: the sequence; its prompt is run ``chunk`` tokens at a time.
        chunk: at least 1; the tokens that come out do not depend on it.
        draft: how many tokens to guess ahead by prompt look-up; 0: none. What comes out does not
            depend on it.
        held: ids that the session's state holds already, from position 0; what they have in
            common with the prompt is not run again.
        counts: filled in as it goes.

    Yields:
        Token and text, as :meth:`Continuation.accept` returns them.

    Raises:
        InputError: the session was used for something else in between, or ``held`` does not have
            as many ids as the state.
    """
    counts = counts or Counts()
    lookup = PromptLookup(row.prompt_ids) if draft else None
    start = _keep(session, held, row.prompt_ids)
    counts.reused = start
    logits = _prefill(session, row.prompt_ids, start, chunk)
    token, text = row.accept(logits)
    position = session.position
    yield token, text
    while not row.finished:
        _check_position(session, position)
        guess: list[int] = []
        if lookup is not None:
            lookup.append(token)
            # The last token of all need not be run, so there is room for one guess less.
            guess = lookup.draft(min(draft, row.room - 1))
        rows = run_ids(session, [token, *guess])
        counts.guessed += len(guess)
        for index in range(len(rows)):
            token, text = row.accept(rows[index])
            goes_on = index < len(guess) and token == guess[index] and not row.finished
            position += 1
            # A state that cannot go back is built anew, and then no more is guessed.
            if not (goes_on or index == len(guess) or _back(session, row, position, chunk)):
                lookup = None
            yield token, text
            if not goes_on:
                break
            counts.kept += 1
            if lookup is not None:
                lookup.append(token)


def decode_batch(
    session: Session, rows: Sequence[Continuation], *, chunk: int
) -> Iterator[tuple[int, str]]:
    """Run several sequences until each has ended; prompts may differ in length.

    Where the session takes rows of different lengths they are run together: a row that has
    ended takes part with no tokens, one whose prompt is done goes on while others' prompts are
    still being run. Otherwise they are run one after the other.

    Args:
        session: its state is reset.
        rows: the sequences.
        chunk: prompt tokens of a row in one run, at least 1.

    Yields:
        The index of a row that got its next token, and the text that became certain with it.
    """
    if not takes_lengths(session):
        for index, row in enumerate(rows):
            for _, text in decode(session, row, chunk=chunk):
                yield index, text
        return
    session.reset()
    left = [list(row.prompt_ids) for row in rows]
    while not all(row.finished for row in rows):
        feed = []
        for at, row in enumerate(rows):
            feed.append([] if row.finished else left[at][:chunk])
            left[at] = left[at][chunk:]
        logits = _advance(session, feed)
        for at, row in enumerate(rows):
            if not row.finished and not left[at]:
                token, text = row.accept(logits[at])
                left[at] = [token]
                yield at, text


def takes_lengths(session: Session) -> bool:
    """Whether the session runs rows of different lengths together.

    It does if all its state is in pools that know each row's length; padding would get into state
    that is carried by value.
    """
    plan = session.plan
    if plan is None or not plan.ragged:
        return False
    if session.step_extents is not None and session.step_extents.batch == 1:
        return False
    return {state.name for state in session.states} <= {pool.state for pool in plan.pools}


def _advance(session: Session, feed: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Run new tokens of every row together.

    Args:
        session: its state goes on.
        feed: the new tokens of each row, padded here; a row may have none.

    Returns:
        For each row the logits [vocab] of its last token (of a row without tokens: anything).
    """
    lengths = [len(tokens) for tokens in feed]
    ids = np.zeros((len(feed), max(lengths)), np.int64)
    for index, tokens in enumerate(feed):
        ids[index, : len(tokens)] = tokens
    outputs = session.run({session.inputs[0].name: ids}, lengths=lengths, logits="last")
    return [row[0] for row in outputs["logits"]]


def run_ids(session: Session, ids: Sequence[int], logits: Logits = "all") -> np.ndarray:
    """Logits [len(ids), vocab] of more tokens of one sequence, or [1, vocab] of the last one.

    The state goes on.
    """
    outputs = session.run({session.inputs[0].name: np.array([ids], np.int64)}, logits=logits)
    result: np.ndarray = outputs["logits"][0]
    return result


def _prefill(session: Session, ids: Sequence[int], start: int, chunk: int) -> np.ndarray:
    """Run ``ids[start:]``; the logits [vocab] of the last one."""
    logits = np.zeros(0, np.float32)
    for at in range(start, len(ids), chunk):
        _check_position(session, at)
        logits = run_ids(session, ids[at : at + chunk], "last")[0]
    return logits


def _back(session: Session, row: Continuation, position: int, chunk: int) -> bool:
    """Take the state back to a position; whether that went without running the tokens again."""
    try:
        session.trim(position)
    except HalError:  # of fixed size, or a sliding window has moved on
        session.reset()
        _prefill(session, [*row.prompt_ids, *row.token_ids][:position], 0, chunk)
        return False
    return True


def _keep(session: Session, held: Sequence[int], ids: Sequence[int]) -> int:
    """Bring the session's state to a beginning of ``ids``; how many tokens that is."""
    if not held:
        session.reset()
        return 0
    if session.position != len(held):
        raise InputError(
            f"{len(held)} held ids are given, the session's state has {session.position}",
            "pass the ids that the state holds, or none",
        )
    common = 0
    # At least one token is run, for its logits.
    while common < min(len(held), len(ids) - 1) and held[common] == ids[common]:
        common += 1
    if common == len(held):
        return common
    try:
        session.trim(common)
    except HalError:  # a state that cannot go back: from the beginning, then
        session.reset()
        return 0
    return common


def _check_position(session: Session, expected: int) -> None:
    if session.position != expected:
        raise InputError(
            f"the session is at position {session.position}, generation left it at {expected}",
            "finish one generation before the session is used again, or open another session",
        )
