"""Sampling keeps the tokens that transformers keeps, with its probabilities, and is reproducible."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as tf

from hal.errors import InputError
from hal.runtime.sampling import Sampler, SamplingOptions, softmax

VOCABULARY = 300


def by_transformers(options: SamplingOptions, logits: np.ndarray, ids: list[int]) -> np.ndarray:
    """Probabilities by transformers' own processors, in the order that its generate uses."""
    steps: list[Any] = []
    if options.repetition_penalty != 1.0:
        steps.append(tf.RepetitionPenaltyLogitsProcessor(float(options.repetition_penalty)))
    if options.temperature:
        steps.append(tf.TemperatureLogitsWarper(float(options.temperature)))
        if options.top_k:
            steps.append(tf.TopKLogitsWarper(options.top_k))
        if options.top_p is not None and options.top_p < 1:
            steps.append(tf.TopPLogitsWarper(options.top_p))
        if options.min_p is not None:
            steps.append(tf.MinPLogitsWarper(options.min_p))
    scores = torch.from_numpy(logits[None].copy())
    for step in steps:
        scores = step(torch.tensor([ids]), scores)
    return scores.double().softmax(-1)[0].numpy()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.5, "top_k": 40},
        {"temperature": 1.0, "top_k": 1000},
        {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 0.5, "top_p": 0.35},
        {"temperature": 1.0, "min_p": 0.0},
        {"temperature": 2.0, "min_p": 0.05},
        {"temperature": 1.0, "min_p": 1.0},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8, "temperature": 0.9},
        {"temperature": 0.9, "top_k": 50, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_keeps_what_transformers_keeps(options: dict[str, Any], seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, VOCABULARY).astype(np.float32)
    ids = rng.integers(0, VOCABULARY, 20).tolist()
    chosen = SamplingOptions(**options)
    actual = softmax(chosen.filtered(logits, ids))
    expected = by_transformers(chosen, logits, ids)
    assert ((actual > 0) == (expected > 0)).all()
    assert np.abs(actual - expected).max() < 1e-6


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.integers(-8, 8), min_size=2, max_size=30),
    top_k=st.integers(0, 40),
    min_p=st.sampled_from([None, 0.0, 0.3, 1.0]),
)
def test_ties_are_kept_as_transformers_keeps_them(
    logits: list[int], top_k: int, min_p: float | None
) -> None:
    values = np.array(logits, np.float32)
    options = SamplingOptions(temperature=1.0, top_k=top_k, min_p=min_p)
    kept = np.isfinite(options.filtered(values, []))
    assert (kept == (by_transformers(options, values, [0]) > 0)).all()


def test_draws_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = Sampler(SamplingOptions(temperature=1.0), seed=0)
    counts = np.bincount([sampler.pick(logits, []) for _ in range(20000)], minlength=4)
    assert np.abs(counts / 20000 - [0.5, 0.3, 0.15, 0.05]).max() < 0.012


def test_the_same_seed_gives_the_same_tokens_and_rows_differ() -> None:
    logits = np.zeros(VOCABULARY, np.float32)

    def draw(seed: int | None, row: int = 0) -> list[int]:
        sampler = Sampler(SamplingOptions(temperature=1.0), seed, row)
        return [sampler.pick(logits, []) for _ in range(12)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    assert draw(3, row=1) != draw(3)
    assert draw(None) != draw(None)


def test_a_dropped_token_is_never_drawn() -> None:
    logits = np.array([0.0, 5.0, 0.0, 5.0], np.float32)
    sampler = Sampler(SamplingOptions(temperature=1.0, top_k=2), seed=1)
    assert {sampler.pick(logits, []) for _ in range(200)} == {1, 3}


def test_without_a_temperature_the_best_token_wins() -> None:
    logits = np.array([1.0, 3.0, 2.9], np.float32)
    for temperature in (0, None, 0.0):
        options = SamplingOptions(temperature=temperature, top_k=1, top_p=0.1, min_p=0.5)
        assert Sampler(options).pick(logits, []) == 1
    assert Sampler(SamplingOptions(repetition_penalty=1.2)).pick(logits, [1]) == 2


def test_tokens_that_are_not_allowed_are_not_chosen() -> None:
    logits = np.array([1.0, 3.0, 2.0], np.float32)
    allowed = np.array([True, False, True])
    assert Sampler(SamplingOptions()).pick(logits, [], allowed) == 2
    sampler = Sampler(SamplingOptions(temperature=5.0), seed=0)
    assert {sampler.pick(logits, [], allowed) for _ in range(100)} == {0, 2}


def test_logits_are_not_changed() -> None:
    logits = np.arange(8, dtype=np.float32)
    SamplingOptions(temperature=0.5, top_k=2, repetition_penalty=2.0).filtered(logits, [1])
    assert (logits == np.arange(8)).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-40, 1e-9, 100.0])
@pytest.mark.parametrize("penalty", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("size", [1.0, 1e38])
def test_extreme_values_choose_without_warnings(
    temperature: float, penalty: float, size: float
) -> None:
    logits = np.array([-1.0, 3.0, 2.9, -np.inf], np.float32) * np.float32(size)
    filters: dict[str, Any] = {"top_k": 3, "top_p": 0.9, "min_p": 0.01}
    options = SamplingOptions(temperature=temperature, repetition_penalty=penalty, **filters)
    greedy = Sampler(SamplingOptions(repetition_penalty=penalty))
    token = Sampler(options, seed=0).pick(logits, [0, 1])
    assert token != 3
    if temperature < 1:
        assert token == greedy.pick(logits, [0, 1])


def test_where_nothing_is_allowed_the_logits_are_not_blamed() -> None:
    with pytest.raises(InputError, match="none that is allowed"):
        Sampler(SamplingOptions()).pick(np.ones(2, np.float32), [], np.zeros(2, bool))


@pytest.mark.parametrize("logits", [[np.nan, 1.0], [-np.inf, -np.inf], [np.inf, 0.0]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(logits: list[float], temperature: float) -> None:
    sampler = Sampler(SamplingOptions(temperature=temperature), seed=0)
    with pytest.raises(InputError, match="not finite"):
        sampler.pick(np.array(logits, np.float32), [])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "1"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 1.01),
        ("top_p", -0.5),
        ("min_p", 2),
        ("min_p", "a"),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", None),
        ("repetition_penalty", 1e-308),
        ("repetition_penalty", 101),
        ("temperature", 100.1),
        pytest.param("temperature", 10**400, id="temperature-huge"),
    ],
)
def test_values_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        SamplingOptions(**{name: value})
    assert caught.value.message == f"{name} is {value!r}"
    assert caught.value.hint.startswith(f"{name} is a ")


@pytest.mark.parametrize("seed", [-1, 1.0, "x", True])
def test_a_seed_is_a_whole_number(seed: Any) -> None:
    with pytest.raises(InputError, match="seed is"):
        Sampler(SamplingOptions(), seed)
