"""Many clients at once, clients that leave, and more of them than the server takes."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import hal
from hal.runtime.engine import EngineOptions
from hal.server import open_model
from tests.models import DEMO
from tests.server.running import Running, eventually, serving

WORDS = ("a", "class", "is", "the", "for", "statement", "of", "lists", "and", "some", "module")
CLIENTS = 256


def prompts(count: int) -> list[str]:
    source = random.Random(3)
    system = "You answer questions about the language reference in a few friendly words. "
    return [
        (system * 2 if source.random() < 0.5 else "")
        + " ".join(source.choices(WORDS, k=source.randint(1, 25)))
        + f" {index}"
        for index in range(count)
    ]


async def _ask_all(server: Running, asked: list[tuple[str, int]]) -> list[str]:
    limits = httpx.Limits(max_connections=None)
    http = httpx.AsyncClient(limits=limits, timeout=120)
    async with server.async_client(http_client=http) as client:

        async def ask(index: int, prompt: str, tokens: int) -> str:
            common: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": tokens}
            if index % 2:
                answer = await client.completions.create(prompt=prompt, **common)
                return answer.choices[0].text
            stream = await client.completions.create(prompt=prompt, stream=True, **common)
            return "".join([chunk.choices[0].text async for chunk in stream])

        return await asyncio.gather(*(ask(i, *one) for i, one in enumerate(asked)))


def check_load(server: Running, bundle: hal.Bundle, asked: list[tuple[str, int]]) -> None:
    """Ask everything at once; every answer is there, and is what the prompt gets alone."""
    before = server.idle()
    texts = asyncio.run(_ask_all(server, asked))
    session = bundle.session()
    alone = [session.generate(p, max_new_tokens=n) for p, n in asked]
    assert [i for i, text in enumerate(texts) if text != alone[i].text()] == []
    tokens = sum(len(one.token_ids) for one in alone)
    assert len(set(texts)) > len(asked) * 0.8  # so that mixing them up would show
    after = server.idle()
    grown = {name: after[name] - before[name] for name in after}
    assert grown["hal_requests_total:finished"] == len(asked)
    assert grown["hal_requests_total:rejected"] == grown["hal_requests_total:failed"] == 0
    assert grown["hal_generated_tokens_total"] == tokens
    assert grown["hal_reused_tokens_total"] > 0
    assert grown["hal_steps_total"] < tokens / 2
    assert after["hal_cache_pages_in_use"] == 0


def test_many_requests_at_once_get_the_text_that_each_gets_alone(
    server: Running, bundle: Path
) -> None:
    asked = [(prompt, 4 + index % 9) for index, prompt in enumerate(prompts(CLIENTS))]
    check_load(server, hal.load(bundle), asked)


@pytest.mark.slow
def test_a_trained_model_under_more_load() -> None:
    bundle = hal.compile(DEMO, target="host:tvm", kv_cache="paged")
    limits = EngineOptions(max_batch=24, max_waiting=600, max_pages=200, prefill_chunk=100)
    with serving(open_model(bundle, options=limits)) as server:
        check_load(server, bundle, [(p, 8 + i % 57) for i, p in enumerate(prompts(2 * CLIENTS))])
        assert server.model.engine is not None
        server.model.engine.drop_kept()
        assert server.idle()["hal_prefix_cache_pages"] == 0


def leave(server: Running, *, stream: bool, wait: float) -> None:
    """Send a request by hand and close the connection without a word."""
    host, port = server.address.removeprefix("http://").split(":")
    body = (
        '{"model": "tiny", "prompt": "The for statement", "max_tokens": 240, '
        f'"stream": {str(stream).lower()}, "temperature": 0}}'
    )
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall((head + body).encode())
        if stream:
            connection.recv(200)
        time.sleep(wait)


def test_clients_that_leave_take_no_pages_with_them(server: Running) -> None:
    engine = server.model.engine
    assert engine is not None
    before = server.idle()
    slow = threading.Event()
    step = engine.session.step
    engine.session.step = lambda *a, **k: (slow.wait(0.01), step(*a, **k))[1]  # type: ignore[method-assign]
    source = random.Random(0)
    try:
        threads = [
            threading.Thread(
                target=leave,
                args=(server,),
                kwargs={"stream": bool(i % 2), "wait": source.uniform(0, 0.3)},
            )
            for i in range(24)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        after = server.idle()
    finally:
        engine.session.step = step  # type: ignore[method-assign]
    gone = after["hal_requests_total:cancelled"] - before["hal_requests_total:cancelled"]
    tokens = after["hal_generated_tokens_total"] - before["hal_generated_tokens_total"]
    assert 20 <= gone <= 24
    assert tokens < 24 * 240 / 2
    engine.drop_kept()
    found = server.idle()
    assert found["hal_cache_pages_in_use"] == found["hal_prefix_cache_pages"] == 0
    assert engine.session.state.rows == []


def test_a_stream_that_is_closed_ends_its_request(server: Running) -> None:
    before = server.idle()
    stream = server.client().completions.create(
        model="tiny", prompt="A class is", max_tokens=240, stream=True
    )
    next(iter(stream))
    stream.close()
    server.idle()

    def ended() -> float:
        found = server.metrics()
        names = [f"hal_requests_total:{end}" for end in ("cancelled", "finished")]
        return sum(found[name] - before[name] for name in names)

    eventually(lambda: ended() == 1)


def test_a_full_queue_answers_429_and_when_to_come_back(bundle: Path) -> None:
    limits = EngineOptions(max_batch=1, max_waiting=1)
    model = open_model(hal.load(bundle), options=limits)
    gate = threading.Event()
    step = model.session.step
    model.session.step = lambda *a, **k: (gate.wait(20), step(*a, **k))[1]  # type: ignore[method-assign]
    with serving(model, api_key="secret") as server:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 3}
        headers = {"Authorization": "Bearer secret"}
        place = f"{server.address}/v1/completions"
        texts: list[str] = []

        def ask() -> None:
            answer = httpx.post(place, json=body, headers=headers, timeout=30)
            texts.append(answer.json()["choices"][0]["text"])

        threads = [threading.Thread(target=ask) for _ in range(2)]
        threads[0].start()
        eventually(lambda: server.metrics()["hal_requests_running"] == 1)
        threads[1].start()
        eventually(lambda: server.metrics()["hal_requests_waiting"] == 1)
        refused = httpx.post(place, json=body, headers=headers)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        several = httpx.post(place, json={**body, "n": 2}, headers=headers)
        assert several.status_code == 429
        with pytest.raises(openai.AuthenticationError, match="API key"):
            server.client(api_key="wrong").models.list()
        assert httpx.get(f"{server.address}/v1/models").status_code == 401
        gate.set()
        for thread in threads:
            thread.join()
        assert len(texts) == 2
        assert server.idle()["hal_requests_total:rejected"] == 2
        # The client of OpenAI comes back by itself.
        client = server.client(api_key="secret", max_retries=2)
        assert client.completions.create(**body).choices[0].text is not None  # type: ignore[call-overload]
