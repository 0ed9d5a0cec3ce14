"""How good a model is, and how far from another one: numbers with intervals, from arrays alone.

::

    score = score_text(session, ids, against=reference_session, window=256)
    print(score.perplexity, score.comparison.kl_divergence)

**Intervals.** All are 95 % intervals of the bootstrap over blocks: a block is one window of a text,
or one example. Tokens of a window depend on each other, so a normal approximation over positions
would claim too much; windows, which share no context, are drawn again with replacement instead,
whole, and the percentiles 2.5 and 97.5 of 2,000 such texts are given. Both models are read in the
same draws, so ratios keep what pairing gives. What this leaves out: neighbouring windows may be of
one document, and fewer than about 20 blocks give intervals that are too narrow. With one block
there is none. The draws have a fixed seed: the same input gives the same interval.

Nothing here holds more than one window of logits for two models.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from hal.errors import CheckFailed, InputError

Progress = Callable[[int, int], None]
"""Called with the number of blocks that are done, and of all."""

CONFIDENCE = 0.95
_RESAMPLES = 2000
_SLICE_ELEMENTS = 1 << 21  # of logits that are brought to float64 at once: 16 MiB


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval, which is None where one block cannot give any."""

    value: float
    low: float | None = None
    high: float | None = None

    def to_json(self) -> dict[str, float | None]:
        """``{"value", "low", "high"}``."""
        return dataclasses.asdict(self)

    def map(self, function: Callable[[float], float]) -> Estimate:
        """The estimate of an increasing ``function`` of the figure."""
        ends = (None if end is None else function(end) for end in (self.low, self.high))
        return Estimate(function(self.value), *ends)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A candidate language model beside a reference, on the same tokens.

    Attributes:
        perplexity: of the reference.
        perplexity_ratio: the candidate's perplexity over the reference's.
        kl_divergence: KL(reference ‖ candidate) of the next token, mean over positions, in nats.
        kl_p99: its 99th percentile over positions.
        top1_agreement: share of positions where both find the same token most likely.
    """

    perplexity: Estimate
    perplexity_ratio: Estimate
    kl_divergence: Estimate
    kl_p99: float
    top1_agreement: Estimate


@dataclasses.dataclass(frozen=True)
class TextScore:
    """How well tokens of a text are predicted.

    Attributes:
        positions: tokens that were predicted.
        windows: blocks of the intervals.
        loss: mean of ``-log p(token)``, in nats.
        perplexity: ``exp(loss)``.
        comparison: with a reference, if there was one.
    """

    positions: int
    windows: int
    loss: Estimate
    perplexity: Estimate
    comparison: Comparison | None = None


@dataclasses.dataclass(frozen=True)
class OutputScore:
    """Outputs of a candidate beside a reference's, over examples.

    Attributes:
        cosine: mean over examples of the cosine between the two outputs, flattened.
        cosine_min: the worst example's.
        max_error: largest absolute difference of an element.
        relative_error: ``‖candidate - reference‖ / ‖reference‖`` over all examples.
        top1_agreement: share of examples with the same largest element; None unless the output is
            ``[examples, classes]``.
    """

    cosine: Estimate
    cosine_min: float
    max_error: float
    relative_error: Estimate
    top1_agreement: Estimate | None = None


class Predicts(Protocol):
    """What :func:`score_text` asks of a session."""

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits ``[len(ids), vocab]``; row ``i`` is about the token after ``ids[i]``."""


class Recorded:
    """A reference whose logits are kept, so that many candidates are compared and it runs once.

    Takes ``4 * vocab`` bytes for each position, as long as it lives: for a few thousand tokens.
    """

    def __init__(self, session: Predicts) -> None:
        self._session = session
        self._kept: dict[bytes, np.ndarray] = {}

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """What the session gave for these ``ids`` the first time."""
        key = np.asarray(ids, np.int64).tobytes()
        if key not in self._kept:
            self._kept[key] = self._session.logits(ids)
        return self._kept[key]


def score_text(
    session: Predicts,
    ids: np.ndarray,
    *,
    window: int,
    against: Predicts | None = None,
    prefix: Sequence[int] = (),
    progress: Progress | None = None,
) -> TextScore:
    """Predict each token of a text from the ones before it in its window.

    Args:
        session: the model; anything with :meth:`hal.Session.logits`.
        ids: token ids ``[n]``, any integer dtype.
        window: tokens that are predicted in one go; windows do not overlap.
        against: a reference that reads the same tokens.
        prefix: tokens that each window begins with, and that are not predicted. Without, the first
            token of the text is not predicted.
        progress: told after each window.

    Raises:
        InputError: no token is left to predict, or the two vocabularies differ in size.
        CheckFailed: logits are not numbers.
    """
    cuts = list(windows(len(ids), window, len(prefix)))
    if not cuts:
        raise InputError(
            f"{len(ids)} token(s) leave none to predict", "give a text of two tokens or more"
        )
    tally = TextTally()
    for done, (start, end) in enumerate(cuts, 1):
        # Without a prefix the token before the window is its context.
        context = ids[start:end] if prefix else ids[start - 1 : end]
        row = np.concatenate([np.asarray(prefix, np.int64), context.astype(np.int64)])
        goal = ids[start:end]
        ours = session.logits(row[:-1])[-len(goal) :]
        theirs = against.logits(row[:-1])[-len(goal) :] if against else None
        tally.add(goal, ours, theirs)
        if progress:
            progress(done, len(cuts))
    return tally.score()


def windows(length: int, window: int, prefix: int = 0) -> Iterator[tuple[int, int]]:
    """Ranges of positions that are predicted together.

    >>> list(windows(8, 3)), list(windows(4, 3, prefix=1))
    ([(1, 4), (4, 7), (7, 8)], [(0, 3), (3, 4)])
    """
    for start in range(0 if prefix else 1, length, window):
        yield start, min(start + window, length)


class TextTally:
    """Adds up windows of logits, for callers who have their own way to them."""

    def __init__(self) -> None:
        self._blocks: list[tuple[float, ...]] = []
        self._divergences: list[np.ndarray] = []
        self._compared: bool | None = None

    def add(
        self, goal: np.ndarray, logits: np.ndarray, reference: np.ndarray | None = None
    ) -> None:
        """Count one window.

        Args:
            goal: the tokens that came, ``[n]``.
            logits: of the candidate, ``[n, vocab]``, any float dtype.
            reference: of the reference, the same shape; in all windows or in none.

        Raises:
            InputError: the vocabularies differ in size, or a token is not in them.
            CheckFailed: logits are not numbers, or leave the token that came no probability.
        """
        if reference is not None and reference.shape != logits.shape:
            raise InputError(
                f"the vocabularies differ: {logits.shape[-1]} and {reference.shape[-1]} tokens",
                "compare models that share a tokenizer",
            )
        if len(goal) and not 0 <= int(goal.min()) <= int(goal.max()) < logits.shape[-1]:
            raise InputError(
                f"a token is not in the vocabulary of {logits.shape[-1]}",
                "use the model's own tokenizer",
            )
        if self._compared not in (None, reference is not None):
            raise InputError("some windows have a reference, others have none", "give all or none")
        self._compared = reference is not None
        first = int(sum(block[0] for block in self._blocks))
        step = max(1, _SLICE_ELEMENTS // max(1, logits.shape[-1]))
        sums = np.zeros(4)
        for at in range(0, len(goal), step):
            part = slice(at, at + step)
            theirs = None if reference is None else reference[part]
            sums += self._add_slice(goal[part], logits[part], theirs, first + at)
        self._blocks.append((len(goal), *sums.tolist()))

    def _add_slice(
        self, goal: np.ndarray, logits: np.ndarray, reference: np.ndarray | None, first: int
    ) -> np.ndarray:
        """Sums of loss, reference's loss, divergence and agreement, ``[4]``."""
        log_q = log_softmax(logits, first, "the model")
        rows = np.arange(len(goal))
        loss = _losses(log_q[rows, goal], first, "the model")
        if reference is None:
            return np.array([loss.sum(), 0.0, 0.0, 0.0])
        log_p = log_softmax(reference, first, "the reference")
        base = _losses(log_p[rows, goal], first, "the reference")
        with np.errstate(invalid="ignore"):  # -inf - -inf, where p is 0
            terms = np.exp(log_p) * (log_p - log_q)
        divergence = np.where(np.isneginf(log_p), 0.0, terms).sum(-1)
        if not np.isfinite(divergence).all():
            place = first + int(np.argmin(np.isfinite(divergence)))
            raise CheckFailed(
                f"at position {place} the model excludes a token that the reference does not",
                "compare models that mask the same tokens",
            )
        self._divergences.append(divergence.astype(np.float32))
        agree = log_p.argmax(-1) == log_q.argmax(-1)
        return np.array([loss.sum(), base.sum(), divergence.sum(), agree.sum()])

    def score(self) -> TextScore:
        """Figures of what was added.

        Raises:
            InputError: nothing was.
        """
        blocks = np.array(self._blocks, np.float64).reshape(-1, 5)
        if not blocks[:, 0].sum():
            raise InputError("no token was predicted", "give a text of two tokens or more")
        loss, base, divergence, agreement, gap = bootstrap(
            blocks[:, 0], [*blocks[:, 1:].T, blocks[:, 1] - blocks[:, 2]]
        )
        comparison = None
        if self._compared:
            comparison = Comparison(
                perplexity=base.map(_exp),
                perplexity_ratio=gap.map(_exp),
                kl_divergence=divergence,
                kl_p99=float(np.percentile(np.concatenate(self._divergences), 99)),
                top1_agreement=agreement,
            )
        return TextScore(int(blocks[:, 0].sum()), len(blocks), loss, loss.map(_exp), comparison)


def log_softmax(logits: np.ndarray, first: int = 0, whose: str = "the model") -> np.ndarray:
    """Log-probabilities, float64 ``[n, vocab]``; ``-inf`` stays what it is.

    Raises:
        CheckFailed: a row has NaN or +inf, or nothing but -inf; names its position from ``first``.
    """
    wide = logits.astype(np.float64)
    top = wide.max(-1, keepdims=True, initial=-np.inf)
    bad = ~np.isfinite(top[:, 0])
    if bad.any():
        place = int(np.argmax(bad))
        raise CheckFailed(
            f"the logits of {whose} at position {first + place} are not numbers "
            f"(largest: {top[place, 0]})",
            "hal verify BUNDLE finds the first tensor that is wrong",
        )
    wide -= top
    wide -= np.log(np.exp(wide).sum(-1, keepdims=True))
    return wide


def _losses(log_probabilities: np.ndarray, first: int, whose: str) -> np.ndarray:
    lost = np.isneginf(log_probabilities)
    if lost.any():
        raise CheckFailed(
            f"{whose} gives the token at position {first + int(np.argmax(lost))} no probability",
            "the perplexity is infinite: use a text without tokens that the model excludes",
        )
    return -log_probabilities


class OutputTally:
    """Adds up examples of one output of two models."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._blocks: list[np.ndarray] = []
        self._max_error = 0.0
        self._classes = True

    def add(self, ours: np.ndarray, theirs: np.ndarray) -> None:
        """Count examples, ``[examples, …]`` of any dtype.

        Raises:
            InputError: the shapes differ.
            CheckFailed: a result is not a number.
        """
        if ours.shape != theirs.shape:
            raise InputError(
                f"output {self.name!r} is {list(ours.shape)} here and {list(theirs.shape)} in the "
                "reference",
                "compare two builds of one model",
            )
        seen = sum(len(block) for block in self._blocks)
        a = self._flat(ours, "the model", seen)
        b = self._flat(theirs, "the reference", seen)
        self._classes &= ours.ndim == 2 and ours.shape[1] > 1
        self._max_error = max(self._max_error, float(np.abs(a - b).max(initial=0.0)))
        squares = (b * b).sum(-1)
        agree = a.argmax(-1) == b.argmax(-1) if self._classes else np.zeros(len(a))
        self._blocks.append(
            np.stack([_cosines(a, b, squares), ((a - b) ** 2).sum(-1), squares, agree], axis=-1)
        )

    def _flat(self, array: np.ndarray, whose: str, seen: int) -> np.ndarray:
        flat: np.ndarray = array.reshape(len(array), math.prod(array.shape[1:]))
        flat = flat.astype(np.float64)
        bad = ~np.isfinite(flat).all(-1)
        if bad.any():
            raise CheckFailed(
                f"output {self.name!r} of {whose} is not finite for example "
                f"{seen + int(np.argmax(bad))}",
                "hal verify BUNDLE finds the first tensor that is wrong",
            )
        return flat

    def score(self) -> OutputScore:
        """Figures of what was added."""
        blocks = np.concatenate(self._blocks)
        ones = np.ones(len(blocks))
        cosine, agreement = bootstrap(ones, [blocks[:, 0], blocks[:, 3]])
        total = blocks[:, 2].sum()
        relative = Estimate(0.0, 0.0, 0.0)
        if total:
            (relative,) = bootstrap(blocks[:, 2], [blocks[:, 1]])
        elif blocks[:, 1].any():
            relative = Estimate(math.inf)
        return OutputScore(
            cosine=cosine,
            cosine_min=float(blocks[:, 0].min()),
            max_error=self._max_error,
            relative_error=relative.map(math.sqrt),
            top1_agreement=agreement if self._classes else None,
        )


def _cosines(a: np.ndarray, b: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Of each row; two rows of zeros are alike."""
    norms = np.sqrt((a * a).sum(-1) * squares)
    products = np.where(norms > 0, (a * b).sum(-1), 0.0)
    alike = (a == b).all(-1)
    return np.where(alike, 1.0, products / np.where(norms > 0, norms, 1.0))


def accuracy(hits: np.ndarray) -> Estimate:
    """Share of true values of ``hits``, ``[examples]``."""
    (share,) = bootstrap(np.ones(len(hits)), [hits.astype(np.float64)])
    return share


def bootstrap(
    weights: np.ndarray, sums: Sequence[np.ndarray], resamples: int = _RESAMPLES
) -> list[Estimate]:
    """``sum(s) / sum(weights)`` for each of ``sums``, with an interval from drawing blocks again.

    Args:
        weights: of each block, ``[blocks]``, for example its number of tokens.
        sums: of each figure over each block, ``[blocks]`` each. All figures see the same draws.
        resamples: number of draws.
    """
    table = np.stack([weights, *sums], axis=-1).astype(np.float64)
    total = table.sum(0)
    values = total[1:] / total[0]
    if len(table) < 2:
        return [Estimate(float(value)) for value in values]
    random = np.random.default_rng(0)
    drawn = np.stack(
        [table[random.integers(len(table), size=len(table))].sum(0) for _ in range(resamples)]
    )
    kept = drawn[drawn[:, 0] > 0]
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(kept[:, 1:] / kept[:, :1], [tail, 100 - tail], axis=0)
    return [Estimate(*map(float, three)) for three in zip(values, low, high, strict=True)]


def to_json(score: Any) -> Any:
    """A score as plain dictionaries; what is None is left out, but for the ends of intervals."""
    if isinstance(score, Estimate):
        return score.to_json()
    if dataclasses.is_dataclass(score):
        names = [field.name for field in dataclasses.fields(score)]
        return to_json({name: getattr(score, name) for name in names})
    if isinstance(score, Mapping):
        return {name: to_json(value) for name, value in score.items() if value is not None}
    return score


def _exp(nats: float) -> float:
    """``exp``, the largest float where that would overflow."""
    return math.exp(min(nats, 709.0))
