"""Continuous batching without a model: nothing mixed up, nothing lost, nothing left behind."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hal.errors import InputError
from hal.runtime.engine import Engine, EngineBusy, EngineClosed, EngineOptions, Request
from hal.runtime.generate import GenerationOptions
from tests.runtime.pooled_session import PooledSession

Start = Callable[..., Engine]


@pytest.fixture
def start() -> Iterator[Start]:
    started = []

    def make(session: Any = None, **options: Any) -> Engine:
        engine = Engine(session or PooledSession(), EngineOptions(**options))
        started.append(engine)
        return engine

    yield make
    for engine in started:
        engine.session.gate.set()  # type: ignore[attr-defined]
        engine.close(drain=False)
        assert not engine.session.state.rows


def options(tokens: int = 12, **more: Any) -> GenerationOptions:
    return GenerationOptions(max_new_tokens=tokens, **more)


def finished(request: Request) -> list[int]:
    request.text()
    return request.token_ids


def alone(prompt: Any, **more: Any) -> list[int]:
    with Engine(PooledSession(), EngineOptions(max_batch=1, kept_rows=0)) as engine:  # type: ignore[arg-type]
        return finished(engine.submit(prompt, options(**more)))


def eventually(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to be so")


def many_prompts(count: int) -> list[str]:
    source = random.Random(0)
    beginnings = ["", "You are a helpful assistant that answers in one short sentence. "]
    return [
        source.choice(beginnings) + "".join(source.choices("abc ", k=source.randint(1, 90)))
        for _ in range(count)
    ]


# -- together as alone ------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["paged", "contiguous"])
@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_requests_get_together_what_they_get_alone(start: Start, layout: str, chunk: int) -> None:
    prompts = many_prompts(24)
    engine = start(PooledSession(layout), max_batch=5, prefill_chunk=chunk, kept_rows=3)
    requests = [engine.submit(p, options(1 + i % 40)) for i, p in enumerate(prompts)]
    for index, (prompt, request) in enumerate(zip(prompts, requests, strict=True)):
        assert finished(request) == alone(prompt, tokens=1 + index % 40)
    figures = engine.figures()
    assert (figures.finished, figures.running, figures.waiting) == (24, 0, 0)
    assert figures.pages == 0
    assert figures.new_tokens == sum(len(r.token_ids) for r in requests)


def test_sequences_run_in_the_same_steps(start: Start) -> None:
    session = PooledSession()
    session.gate.clear()
    engine = start(session, max_batch=4)
    requests = [engine.submit(f"prompt {i}", options(10)) for i in range(8)]
    session.gate.set()
    for request in requests:
        finished(request)
    assert max(map(len, session.calls)) == 4


def test_a_contiguous_build_runs_one_row_at_a_time(start: Start) -> None:
    session = PooledSession("contiguous")
    engine = start(session, max_batch=4)
    assert engine.max_batch == 1
    for request in [engine.submit("some prompt", options()) for _ in range(3)]:
        finished(request)
    assert {len(rows) for rows in session.calls} == {1}


def test_a_long_prompt_does_not_hold_up_those_that_run(start: Start) -> None:
    session = PooledSession()
    engine = start(session, prefill_chunk=8)
    first = engine.submit("short", options(30))
    pieces = iter(first)
    next(pieces)
    second = engine.submit("a" * 120, options(1))
    ends: list[str] = []
    threads = [
        threading.Thread(target=lambda: (finished(second), ends.append("second"))),
        threading.Thread(target=lambda: (list(pieces), ends.append("first"))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert first.token_ids == alone("short", tokens=30)
    assert second.token_ids == alone("a" * 120, tokens=1)
    assert engine.figures().steps >= 30 + 15


def test_draws_repeat_with_their_seed_whatever_runs_beside(start: Start) -> None:
    engine = start(max_batch=8)
    sampling = {"temperature": 1.5, "seed": 7}
    requests = [engine.submit("draw", options(**sampling), index=i) for i in range(3)]
    again = [engine.submit("draw", options(**sampling), index=i) for i in range(3)]
    drawn = [finished(r) for r in requests]
    assert drawn == [finished(r) for r in again]
    assert drawn[0] == alone("draw", **sampling)
    assert len({tuple(d) for d in drawn}) == 3


def test_pieces_come_one_by_one_and_say_how_it_ended(start: Start) -> None:
    request = start().submit([1, 2, 3], options(5))
    pieces = list(request)
    assert [p.token for p in pieces] == request.token_ids
    assert [p.last for p in pieces] == [False] * 4 + [True]
    assert pieces[-1].finish_reason == "length"


# -- prefixes ---------------------------------------------------------------------------------


def test_a_conversation_goes_on_from_the_pages_of_its_last_turn(start: Start) -> None:
    engine = start()
    turn = "x" * 50
    ids = [*turn.encode(), *finished(engine.submit(turn, options(20)))]
    more = [*ids, *b"and another question"]
    assert finished(engine.submit(more, options())) == alone(more)
    assert engine.figures().reused_tokens == 69  # the last token of a turn was never run


def test_a_running_sequence_is_shared_too(start: Start) -> None:
    session = PooledSession()
    session.gate.clear()
    engine = start(session, kept_rows=0)
    prompts = ["s" * 70 + tail for tail in ("one", "two", "three")]
    requests = [engine.submit(p, options(30)) for p in prompts]
    session.gate.set()
    assert [finished(r) for r in requests] == [alone(p, tokens=30) for p in prompts]
    # "two" and "three" begin with the same letter
    assert engine.figures().reused_tokens == 70 + 71


def test_a_batch_of_one_reuses_pages_too(start: Start) -> None:
    engine = start(max_batch=1)
    for _ in range(2):
        finished(engine.submit("b" * 64, options(4)))
    assert engine.figures().reused_tokens == 63


def test_less_than_a_page_in_common_is_run_again(start: Start) -> None:
    engine = start()
    finished(engine.submit("y" * 31, options(1)))
    finished(engine.submit("y" * 31 + "z", options(1)))
    assert engine.figures().reused_tokens == 0


def test_finished_rows_are_kept_up_to_a_number_and_can_be_dropped(start: Start) -> None:
    engine = start(kept_rows=2)
    for letter in "abc":
        finished(engine.submit(letter * 40, options(1)))
    figures = engine.figures()
    assert (figures.kept_rows, figures.kept_pages, figures.pages) == (2, 4, 0)
    for letter, reused in (("a", 0), ("c", 39), ("b", 39)):
        before = engine.figures().reused_tokens
        finished(engine.submit(letter * 40, options(1)))
        assert engine.figures().reused_tokens - before == (reused if letter == "c" else 0)
    engine.drop_kept()
    assert engine.figures().kept_pages == 0
    assert engine.session.state.store is not None
    assert engine.session.state.store.pages_in_use() == 0


def test_the_same_request_again_keeps_one_row(start: Start) -> None:
    engine = start()
    for _ in range(3):
        finished(engine.submit("q" * 64, options(20)))
    assert engine.figures().kept_rows == 1


# -- limits -----------------------------------------------------------------------------------


def test_a_full_queue_refuses_and_goes_on(start: Start) -> None:
    session = PooledSession()
    session.gate.clear()
    engine = start(session, max_batch=1, max_waiting=2)
    running = engine.submit("a", options(3))
    eventually(lambda: engine.figures().running == 1)
    waiting = [engine.submit("b", options(3)) for _ in range(2)]
    with pytest.raises(EngineBusy, match="2 requests are waiting"):
        engine.submit("c", options(3))
    assert engine.figures().rejected == 1
    session.gate.set()
    assert [len(finished(r)) for r in (running, *waiting)] == [3, 3, 3]
    assert len(finished(engine.submit("c", options(3)))) == 3


def test_rows_wait_until_they_can_have_their_pages(start: Start) -> None:
    session = PooledSession()
    most = 0

    def watch() -> None:
        nonlocal most
        most = max(most, session.store.pages_in_use())

    step = session.step
    session.step = lambda *a, **k: (watch(), step(*a, **k), watch())[1]  # type: ignore[method-assign]
    engine = start(session, max_batch=8, max_pages=5)
    prompts = many_prompts(12)
    requests = [engine.submit(p, options(8)) for p in prompts]
    assert [finished(r) for r in requests] == [alone(p, tokens=8) for p in prompts]
    assert 3 <= most <= 5


def test_a_request_that_never_fits_is_refused(start: Start) -> None:
    engine = start(max_pages=2)
    with pytest.raises(InputError, match="may take 3 pages of the cache, there are 2"):
        engine.submit("a" * 60, options(10))


@pytest.mark.parametrize(
    ("prompt", "words"),
    [([], "prompt is empty"), ([1, 999], "outside"), ("a" * 64, "64 positions"), ([[1], [2]], "2")],
)
def test_a_wrong_prompt_is_refused_at_once(start: Start, prompt: Any, words: str) -> None:
    engine = start(PooledSession(max_positions=64))
    with pytest.raises(InputError, match=words):
        engine.submit(prompt, options())
    assert len(finished(engine.submit("a" * 60, options(10)))) == 4  # as far as positions go


@pytest.mark.parametrize("name", ["max_batch", "max_waiting", "prefill_chunk", "max_pages"])
def test_limits_are_checked(name: str) -> None:
    with pytest.raises(InputError, match=name):
        EngineOptions(**{name: 0})


# -- ends -------------------------------------------------------------------------------------


def test_a_cancelled_request_gives_its_row_back(start: Start) -> None:
    session = PooledSession()
    session.gate.clear()
    engine = start(session, max_batch=1)
    running, waiting = (engine.submit(p * 40, options(200)) for p in "ab")
    eventually(lambda: engine.figures().running == 1)
    running.cancel()
    waiting.cancel()
    session.gate.set()
    assert list(waiting)[-1].cancelled
    assert list(running)[-1].cancelled
    running.cancel()  # a second time changes nothing
    session.gate.clear()
    last = engine.submit("c" * 40, options(200))
    eventually(lambda: engine.figures().running == 1)
    last.cancel()
    session.gate.set()
    list(last)
    figures = engine.figures()
    assert (figures.cancelled, figures.pages, figures.kept_pages) == (3, 0, 0)
    assert session.store.pages_in_use() == 0


def test_cancelling_at_random_loses_nothing_of_the_others(start: Start) -> None:
    engine = start(max_batch=6, kept_rows=4)
    source = random.Random(1)
    prompts = many_prompts(40)
    requests = [engine.submit(p, options(30)) for p in prompts]
    gone = set(source.sample(range(40), 20))
    for index in sorted(gone, key=lambda _: source.random()):
        requests[index].cancel()
    for index in set(range(40)) - gone:
        assert finished(requests[index]) == alone(prompts[index], tokens=30)
    for index in gone:
        assert list(requests[index])[-1].last
    engine.drop_kept()
    assert engine.figures().pages == engine.figures().kept_pages == 0


def test_a_step_that_fails_ends_its_requests_and_no_others(start: Start) -> None:
    session = PooledSession()
    session.poison = 200
    engine = start(session)
    with pytest.raises(RuntimeError, match="accelerator is gone"):
        finished(engine.submit([1, 200], options()))
    assert finished(engine.submit([1, 2], options(5))) == alone([1, 2], tokens=5)
    figures = engine.figures()
    assert (figures.failed, figures.finished, figures.pages) == (1, 1, 0)


def test_closing_finishes_what_was_taken(start: Start) -> None:
    engine = start(max_batch=2)
    requests = [engine.submit("abc", options(20)) for _ in range(6)]
    engine.close()
    assert [len(finished(r)) for r in requests] == [20] * 6
    with pytest.raises(EngineClosed):
        engine.submit("abc", options())


def test_closing_at_once_tells_everybody(start: Start) -> None:
    session = PooledSession()
    session.gate.clear()
    engine = start(session, max_batch=2)
    requests = [engine.submit("abc", options(20)) for _ in range(4)]
    eventually(lambda: engine.figures().running > 0)
    threading.Timer(0.2, session.gate.set).start()
    engine.close(timeout=0.01)
    for request in requests:
        with pytest.raises(EngineClosed):
            request.text()
    assert session.store.pages_in_use() == 0
