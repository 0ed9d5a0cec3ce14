"""The adapter for lm-evaluation-harness answers as the harness defines its three questions."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from hal.runtime.generate import generate, teacher_forced_logits
from tests.runtime.fake_session import END, FakeSession

FILE = Path(__file__).parents[2] / "examples" / "lm_eval_adapter.py"


@pytest.fixture(scope="module")
def adapter() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lm_eval_adapter", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["lm_eval_adapter"] = module
    spec.loader.exec_module(module)
    return module


class ScoringSession(FakeSession):
    def logits(self, ids: list[int]) -> np.ndarray:
        return teacher_forced_logits(self, ids)  # type: ignore[arg-type]

    def generate(self, prompt: Any, **options: Any) -> Any:
        return generate(self, prompt, **options)  # type: ignore[arg-type]


def log_probability(ids: list[int], first: int) -> float:
    """Of ``ids[first:]``, token by token, each from all that comes before it."""
    total = 0.0
    for at in range(first, len(ids)):
        logits = ScoringSession().logits(ids[:at])[-1].astype(np.float64)
        total += logits[ids[at]] - np.log(np.exp(logits).sum())
    return total


def test_a_continuation_is_scored_after_its_context(adapter: ModuleType) -> None:
    model = adapter.HalLM(ScoringSession())
    requests = [adapter.Request((c, t)) for c, t in (("ab", " cd"), ("ab ", "cd"), ("", "xy"))]
    first, second, third = model.loglikelihood(requests)
    assert first[0] == pytest.approx(log_probability(list(b"ab cd"), 2))
    assert second == first  # the space belongs to the continuation
    assert third[0] == pytest.approx(log_probability([END, *b"xy"], 1))
    assert first[1] is False


def test_what_greedy_would_say_is_told(adapter: ModuleType) -> None:
    session = ScoringSession("abc")
    session.prompt = 1
    model = adapter.HalLM(session)
    requests = [adapter.Request((" p", t)) for t in ("bca", "bcb", "")]
    assert [greedy for _, greedy in model.loglikelihood(requests)] == [True, False, True]


def test_a_long_text_is_scored_in_windows(adapter: ModuleType) -> None:
    model = adapter.HalLM(ScoringSession(), max_length=4)
    (total,) = model.loglikelihood_rolling([adapter.Request(("abcdefghij",))])
    ids = list(b"abcdefghij")
    expected = log_probability([END, *ids[:4]], 1)
    expected += log_probability(ids[3:8], 1) + log_probability(ids[5:], 3)
    assert total == pytest.approx(expected)
    assert model.loglikelihood_rolling([adapter.Request(("",))]) == [0.0]


@pytest.mark.parametrize("length", range(12))
@pytest.mark.parametrize("window", [1, 2, 3, 5])
def test_windows_predict_each_token_once(adapter: ModuleType, length: int, window: int) -> None:
    ids = list(range(1, length + 1))
    windows = list(adapter.rolling_windows(ids, 0, window))
    assert [i for _, part in windows for i in part] == ids
    for context, part in windows:
        assert context[-1] == part[0] - 1
        assert len(context) + len(part) - 1 <= window
    assert all(len(c) + len(p) - 1 == window for c, p in windows[1:])


def test_generation_stops_where_the_task_says(adapter: ModuleType) -> None:
    session = ScoringSession("one. two. ")
    session.prompt = 1
    model = adapter.HalLM(session)
    options = [{"until": [". t"]}, {"max_gen_toks": 6, "do_sample": False, "temperature": 0.0}]
    requests = [adapter.Request(("p", o)) for o in options]
    assert model.generate_until(requests) == ["one", "one. t"]


def test_a_context_that_is_too_long_loses_its_beginning(adapter: ModuleType) -> None:
    model = adapter.HalLM(ScoringSession(max_positions=8))
    request = adapter.Request(("abcdefghijklm", {"max_gen_toks": 3}))
    assert model.generate_until([request]) == model.generate_until(
        [adapter.Request(("ijklm", {"max_gen_toks": 3}))]
    )
