"""Figures and intervals, against their definitions written out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hal.errors import CheckFailed, InputError
from hal.runtime import scoring
from hal.runtime.scoring import OutputTally, TextTally, bootstrap, score_text, windows

VOCABULARY = 11


class Table:
    """A session whose prediction depends on the last token alone; remembers what it was fed."""

    def __init__(self, seed: int, vocabulary: int = VOCABULARY) -> None:
        self.table = np.random.default_rng(seed).standard_normal((vocabulary, vocabulary)) * 2
        self.fed: list[list[int]] = []

    def logits(self, ids: np.ndarray) -> np.ndarray:
        self.fed.append(ids.tolist())
        return self.table[ids].astype(np.float32)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, count)


# -- language models --------------------------------------------------------------------------


@given(seed=st.integers(0, 50), count=st.integers(2, 60), window=st.integers(1, 70))
@settings(max_examples=30, deadline=None)
def test_figures_are_those_of_their_definitions(seed: int, count: int, window: int) -> None:
    ids, ours, theirs = tokens(count, seed), Table(seed), Table(seed + 1)
    score = score_text(ours, ids, window=window, against=theirs)
    log_q = log_softmax(ours.table[ids[:-1]])
    log_p = log_softmax(theirs.table[ids[:-1]])
    rows, goal = np.arange(count - 1), ids[1:]
    loss, base = -log_q[rows, goal].mean(), -log_p[rows, goal].mean()
    divergence = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    other = score.comparison
    assert other is not None
    assert score.positions == count - 1
    assert score.loss.value == pytest.approx(loss, rel=1e-5)
    assert score.perplexity.value == pytest.approx(math.exp(loss), rel=1e-5)
    assert other.perplexity.value == pytest.approx(math.exp(base), rel=1e-5)
    assert other.perplexity_ratio.value == pytest.approx(math.exp(loss - base), rel=1e-5)
    assert other.kl_divergence.value == pytest.approx(divergence.mean(), rel=1e-5)
    assert other.kl_p99 == pytest.approx(np.percentile(divergence, 99), rel=1e-5)
    same = (log_p.argmax(-1) == log_q.argmax(-1)).mean()
    assert other.top1_agreement.value == pytest.approx(same)


def test_a_model_compared_with_itself_is_exactly_itself() -> None:
    other = score_text(Table(0), tokens(50), window=7, against=Table(0)).comparison
    assert other is not None
    assert other.kl_divergence == scoring.Estimate(0.0, 0.0, 0.0)
    assert other.perplexity_ratio == scoring.Estimate(1.0, 1.0, 1.0)
    assert other.top1_agreement == scoring.Estimate(1.0, 1.0, 1.0)


def test_each_token_is_predicted_once_from_its_own_window() -> None:
    session = Table(0)
    score_text(session, np.array([1, 2, 3, 4, 5, 6]), window=2)
    assert session.fed == [[1, 2], [3, 4], [5]]


def test_a_prefix_begins_every_window_and_is_not_predicted() -> None:
    session = Table(0)
    score = score_text(session, np.array([1, 2, 3, 4, 5]), window=3, prefix=[9])
    assert session.fed == [[9, 1, 2], [9, 4]]
    assert score.positions == 5
    expected = -log_softmax(session.table)[[9, 1, 2, 9, 4], [1, 2, 3, 4, 5]].mean()
    assert score.loss.value == pytest.approx(expected, rel=1e-6)


@given(length=st.integers(0, 50), window=st.integers(1, 60), prefix=st.integers(0, 2))
@settings(max_examples=50, deadline=None)
def test_windows_cover_every_position_once(length: int, window: int, prefix: int) -> None:
    covered = [i for start, end in windows(length, window, prefix) for i in range(start, end)]
    assert covered == list(range(0 if prefix else 1, length))


def test_large_vocabularies_are_read_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = score_text(Table(0), tokens(40), window=20, against=Table(1))
    monkeypatch.setattr(scoring, "_SLICE_ELEMENTS", 3 * VOCABULARY)
    sliced = score_text(Table(0), tokens(40), window=20, against=Table(1))
    assert sliced.loss.value == pytest.approx(whole.loss.value)
    assert sliced.comparison is not None
    assert whole.comparison is not None
    assert sliced.comparison.kl_p99 == pytest.approx(whole.comparison.kl_p99)


def test_a_recorded_reference_runs_once_for_many_candidates() -> None:
    reference = Table(1)
    recorded = scoring.Recorded(reference)
    ids = tokens(20)
    first, second = (score_text(Table(0), ids, window=8, against=recorded) for _ in range(2))
    assert len(reference.fed) == 3
    assert first == second == score_text(Table(0), ids, window=8, against=Table(1))


def test_progress_is_told_after_each_window() -> None:
    told: list[tuple[int, int]] = []
    score_text(Table(0), tokens(7), window=2, progress=lambda *at: told.append(at))
    assert told == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_told_with_their_position(value: float) -> None:
    tally = TextTally()
    good = np.zeros((4, VOCABULARY), np.float32)
    bad = good.copy()
    bad[2, 5] = value
    tally.add(np.zeros(4, int), good)
    with pytest.raises(CheckFailed, match="the logits of the model at position 6 are not numbers"):
        tally.add(np.zeros(4, int), bad)
    with pytest.raises(CheckFailed, match="of the reference at position 2 are not numbers"):
        TextTally().add(np.zeros(4, int), good, bad)


def test_tokens_that_both_models_mask_do_not_matter() -> None:
    ours, theirs = Table(0).table[:5].copy(), Table(1).table[:5].copy()
    ours[:, 3] = theirs[:, 3] = -np.inf
    tally = TextTally()
    tally.add(np.zeros(5, int), ours, theirs)
    masked = tally.score().comparison
    kept = np.delete(ours, 3, axis=1), np.delete(theirs, 3, axis=1)
    tally = TextTally()
    tally.add(np.zeros(5, int), *kept)
    plain = tally.score().comparison
    assert masked is not None
    assert plain is not None
    assert masked.kl_divergence.value == pytest.approx(plain.kl_divergence.value)


def test_a_token_without_probability_is_an_error_and_not_infinity() -> None:
    masked = np.zeros((3, VOCABULARY))
    masked[1, 4] = -np.inf
    with pytest.raises(CheckFailed, match="the token at position 1 no probability"):
        TextTally().add(np.array([0, 4, 0]), masked)
    with pytest.raises(CheckFailed, match="at position 1 the model excludes a token"):
        TextTally().add(np.zeros(3, int), masked, np.zeros((3, VOCABULARY)))


def test_vocabularies_of_other_sizes_and_foreign_tokens_are_refused() -> None:
    with pytest.raises(InputError, match="the vocabularies differ: 11 and 12 tokens"):
        score_text(Table(0), tokens(5), window=4, against=Table(0, 12))
    with pytest.raises(InputError, match="a token is not in the vocabulary of 11"):
        TextTally().add(np.array([11]), np.zeros((1, VOCABULARY)))
    with pytest.raises(InputError, match="leave none to predict"):
        score_text(Table(0), np.array([1]), window=4)
    with pytest.raises(InputError, match="no token was predicted"):
        TextTally().score()


# -- intervals --------------------------------------------------------------------------------


def test_the_interval_is_about_the_standard_error_of_block_means() -> None:
    sums = np.random.default_rng(0).normal(5, 2, 400)
    (estimate,) = bootstrap(np.ones(400), [sums])
    assert estimate.low is not None
    assert estimate.high is not None
    assert estimate.low < estimate.value < estimate.high
    half = 1.96 * sums.std() / 20
    assert estimate.high - estimate.low == pytest.approx(2 * half, rel=0.1)


def test_tokens_that_depend_on_each_other_widen_the_interval() -> None:
    values = np.random.default_rng(0).normal(0, 1, 40)
    (alone,) = bootstrap(np.ones(1600), [np.random.default_rng(1).permutation(values.repeat(40))])
    (together,) = bootstrap(np.full(40, 40.0), [values * 40])

    def width(estimate: Any) -> float:
        return float(estimate.high - estimate.low)

    assert width(together) > 4 * width(alone)


def test_one_block_gives_no_interval_and_the_same_input_the_same_interval() -> None:
    assert bootstrap(np.ones(1), [np.ones(1)]) == [scoring.Estimate(1.0)]
    sums = np.random.default_rng(0).normal(size=30)
    assert bootstrap(np.ones(30), [sums]) == bootstrap(np.ones(30), [sums])


# -- other outputs ----------------------------------------------------------------------------


def test_outputs_are_compared_by_example() -> None:
    theirs = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]], np.float32)
    ours = np.array([[1.0, 0.0], [2.0, 0.0], [6.0, 8.0]], np.float32)
    tally = OutputTally("y")
    tally.add(ours[:1], theirs[:1])
    tally.add(ours[1:], theirs[1:])
    score = tally.score()
    assert score.cosine.value == pytest.approx(2 / 3)
    assert score.cosine_min == 0.0
    assert score.max_error == 4.0
    assert score.relative_error.value == pytest.approx(math.sqrt((8 + 25) / 30))
    assert score.top1_agreement is not None
    assert score.top1_agreement.value == pytest.approx(2 / 3)


def test_outputs_that_are_no_classes_have_no_agreement_and_zeros_are_alike() -> None:
    tally = OutputTally("y")
    tally.add(np.zeros((2, 3, 4)), np.zeros((2, 3, 4)))
    score = tally.score()
    assert score.top1_agreement is None
    assert score.cosine.value == 1.0
    assert score.relative_error.value == 0.0


def test_bad_outputs_are_told() -> None:
    with pytest.raises(InputError, match=r"output 'y' is \[1, 2\] here and \[1, 3\]"):
        OutputTally("y").add(np.zeros((1, 2)), np.zeros((1, 3)))
    bad = np.zeros((2, 2))
    bad[1] = np.nan
    with pytest.raises(CheckFailed, match="of the reference is not finite for example 1"):
        OutputTally("y").add(np.zeros((2, 2)), bad)


def test_scores_become_plain_dictionaries() -> None:
    plain = scoring.to_json(score_text(Table(0), tokens(9), window=20))
    assert set(plain) == {"positions", "windows", "loss", "perplexity"}
    assert plain["perplexity"]["low"] is None
