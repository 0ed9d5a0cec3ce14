"""Choosing the next token from its logits: filters, temperature and a seeded draw, in numpy.

::

    sampler = Sampler(SamplingOptions(temperature=0.8, top_p=0.95), seed=7)
    token = sampler.pick(logits, ids)       # logits [vocab], ids: everything before the new token

The filters, their order and their corner cases are those of transformers' logits processors, so
that the same options keep the same tokens there and here: repetition penalty, temperature, top-k,
top-p, min-p. Without a temperature only the repetition penalty applies and the best token wins.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from hal.errors import InputError


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits, from 0 to 100; 0 or None: greedy, the filters below have
            no say.
        top_k: keep the k most likely tokens (and those that tie with the last); 0 or None: all.
        top_p: keep the fewest tokens whose probabilities sum to at least this; 1 or None: all.
        min_p: keep tokens at least this fraction as likely as the best one; None: all.
        repetition_penalty: logits of tokens that occurred are divided by it if positive, else
            multiplied (CTRL, arXiv:1909.05858), from 0.01 to 100; 1: no effect. Applies to greedy
            choice as well.

    Raises:
        InputError: a value is out of its range; the text names the option and the range.
    """

    temperature: float | None = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        none_allowed = {"temperature", "top_k", "top_p", "min_p"}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.name in none_allowed:
                continue
            _check(field.name, value)

    @property
    def greedy(self) -> bool:
        """Whether the best token wins, without a draw."""
        return not self.temperature

    def filtered(self, logits: np.ndarray, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Logits after penalty, temperature and filters.

        Args:
            logits: floating [vocab], not changed.
            ids: token ids before the new token, the prompt included; for the penalty.

        Returns:
            float64 [vocab], ``-inf`` for tokens that are not kept; with a temperature, the best
            is 0.
        """
        scores = np.array(logits, np.float64)
        if self.repetition_penalty != 1.0 and len(ids):
            scores = _penalize(scores, ids, self.repetition_penalty)
        if not self.temperature:
            return scores
        # The best becomes 0 first: what a tiny temperature sends to -inf is then never the best.
        with np.errstate(over="ignore", invalid="ignore"):
            scores -= scores.max()
            scores /= float(self.temperature)
        if self.top_k:
            k = min(self.top_k, len(scores))
            scores[scores < np.partition(scores, -k)[-k]] = -np.inf
        if self.top_p is not None and self.top_p < 1.0:
            scores = _top_p(scores, self.top_p)
        if self.min_p is not None:
            best = int(scores.argmax())
            chances = softmax(scores)
            drop = chances < self.min_p * chances[best]
            scores[drop] = -np.inf
        return scores


class Sampler:
    """Picks the tokens of one sequence; the same seed and logits give the same tokens.

    Args:
        options: how to choose.
        seed: of the draw; None: different each time.
        row: which sequence of a batch this is; rows draw independently of each other.

    Raises:
        InputError: the seed is not a whole number from 0.
    """

    def __init__(self, options: SamplingOptions, seed: int | None = None, row: int = 0) -> None:
        self.options = options
        if seed is not None:
            _check("seed", seed)
        self._random = np.random.default_rng(None if seed is None else [seed, row])

    def pick(
        self,
        logits: np.ndarray,
        ids: Sequence[int] | np.ndarray,
        allowed: np.ndarray | None = None,
    ) -> int:
        """The next token.

        Args:
            logits: floating [vocab].
            ids: token ids before the new one, the prompt included.
            allowed: bool [vocab], tokens that may come at all; None: every token.

        Raises:
            InputError: no token has a finite logit, some are NaN or infinite, or none of those
                that are allowed has one: there is nothing to choose from.
        """
        if not math.isfinite(float(logits.max())):
            raise InputError(
                "no token can be chosen: the logits are not finite",
                "the weights or the state are damaged: run hal verify on the bundle",
            )
        if allowed is not None:
            logits = np.where(allowed, logits, np.float32(-np.inf))
            if not math.isfinite(float(logits.max())):
                raise InputError(
                    "no token can be chosen: the model gives none that is allowed here a chance",
                    "loosen the grammar",
                )
        scores = logits
        if not self.options.greedy or self.options.repetition_penalty != 1.0:
            scores = self.options.filtered(logits, ids)
        best = int(scores.argmax())
        if self.options.greedy:
            return best
        running = np.cumsum(softmax(scores))
        place = np.searchsorted(running, self._random.random() * running[-1], side="right")
        return int(min(place, len(running) - 1))


def softmax(scores: np.ndarray) -> np.ndarray:
    """Probabilities, float64 [vocab], of floating logits [vocab]; ``-inf`` gives 0."""
    shifted = np.exp(scores.astype(np.float64) - float(scores.max()))
    total: np.ndarray = shifted / shifted.sum()
    return total


def _penalize(scores: np.ndarray, ids: Sequence[int] | np.ndarray, penalty: float) -> np.ndarray:
    seen = np.unique(np.asarray(ids, np.int64))
    values = scores[seen]
    scores[seen] = np.where(values < 0, values * float(penalty), values / float(penalty))
    return scores


def _top_p(scores: np.ndarray, top_p: float) -> np.ndarray:
    """From the least likely up, drop tokens while the sum stays within ``1 - top_p``."""
    order = np.argsort(scores, kind="stable")
    drop = np.cumsum(softmax(scores)[order]) <= 1.0 - top_p
    drop[-1] = False
    scores[order[drop]] = -np.inf
    return scores


_RANGES = {
    "temperature": "a number from 0 to 100 (0 chooses the best token)",
    "top_k": "a whole number from 0 (0 keeps every token)",
    "top_p": "a number from 0 to 1 (1 keeps every token)",
    "min_p": "a number from 0 to 1",
    "repetition_penalty": "a number from 0.01 to 100 (1 has no effect)",
    "seed": "a whole number from 0",
}

_LIMITS = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
}


def _check(name: str, value: object) -> None:
    """Refuse a value that is out of the option's range.

    Raises:
        InputError: it is.
    """
    if not _in_range(name, value):
        raise InputError(f"{name} is {value!r}", f"{name} is {_RANGES[name]}")


def _in_range(name: str, value: object) -> bool:
    if isinstance(value, (bool, np.bool_)):
        return False
    if name in ("top_k", "seed"):
        return isinstance(value, (int, np.integer)) and int(value) >= 0
    if not isinstance(value, (int, float, np.integer, np.floating)):
        return False
    least, most = _LIMITS[name]
    return bool(least <= value <= most)
