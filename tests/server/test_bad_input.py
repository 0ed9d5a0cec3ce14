"""Whatever a client sends: an answer in OpenAI's form with a 4xx, and a server that goes on."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.server.running import Running

CHAT, PLAIN, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
MESSAGES = [{"role": "user", "content": "Hello"}]


def refused(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "Traceback" not in response.text
    return error


@pytest.mark.parametrize("path", [CHAT, PLAIN, EMBED])
@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        "[1, 2",
        "null",
        "[]",
        '"text"',
        b"\xff\xfe",
        b"\x00",
        "{}",
        '{"model": 3}',
        "[" * 100_000,
        '{"model": "tiny", "prompt": ' + "[" * 5000 + "]" * 5000 + "}",
    ],
    ids=lambda body: repr(body[:20]),
)
def test_a_malformed_body(server: Running, path: str, body: str | bytes) -> None:
    assert refused(server.post(path, body))["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": [1]}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 1e-308}, "repetition_penalty"),
        ({"temperature": 101}, "temperature"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": 301}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"stop": 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a", 1]}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"logit_bias": {"5": 100}}, "logit_bias"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"temprature": 1}, "temprature"),
    ],
    ids=str,
)
def test_bad_parameters(server: Running, change: dict[str, Any], param: str) -> None:
    for path, start in ((CHAT, {"messages": MESSAGES}), (PLAIN, {"prompt": "Hello"})):
        error = refused(server.post(path, {"model": "tiny", **start, **change}))
        assert error["param"] == param


def test_values_at_the_ends_of_their_ranges(server: Running) -> None:
    for change in ({"temperature": 1e-300}, {"temperature": 100}, {"repetition_penalty": 0.01}):
        body = {"model": "tiny", "prompt": "Hello", "max_tokens": 4, "temperature": 1, **change}
        assert server.post(PLAIN, body).status_code == 200


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", "1" * 5000])
def test_numbers_that_are_none(server: Running, value: str) -> None:
    body = f'{{"model": "tiny", "prompt": "x", "temperature": {value}}}'
    refused(server.post(PLAIN, body))


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "Hello",
        [5],
        [{}],
        [{"role": "user"}, "text"],
        [{"content": "x"}],
        [{"role": "king", "content": "x"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "tool", "content": "x"}],
        [{"role": "user", "content": "\ud800"}],
    ],
    ids=str,
)
def test_bad_messages(server: Running, messages: Any) -> None:
    refused(server.post(CHAT, json.dumps({"model": "tiny", "messages": messages})))


@pytest.mark.parametrize(
    "prompt",
    ["", [], [[]], [""], [1536], [-1], [10**30], [1.5], [None], {"a": 1}, ["a", [1]], "\ud800"],
    ids=str,
)
def test_bad_prompts(server: Running, prompt: Any) -> None:
    refused(server.post(PLAIN, json.dumps({"model": "tiny", "prompt": prompt})))


def test_a_prompt_longer_than_the_model(server: Running) -> None:
    error = refused(server.post(PLAIN, {"model": "tiny", "prompt": [5] * 256}))
    assert "the prompt has 256 tokens; the model has 256 positions" in error["message"]
    assert error["code"] == "context_length_exceeded"
    long = [{"role": "user", "content": "word " * 500}]
    refused(server.post(CHAT, {"model": "tiny", "messages": long}))


@pytest.mark.parametrize("path", [CHAT, PLAIN, EMBED])
def test_an_unknown_model(server: Running, path: str) -> None:
    body = {"model": "huge", "messages": MESSAGES, "prompt": "x", "input": "x"}
    error = refused(server.post(path, body), 404)
    assert error["code"] == "model_not_found"
    assert "'tiny'" in error["message"]


@pytest.mark.parametrize("size", [(4 << 20) + 1, 20 << 20])
def test_an_oversized_body(server: Running, size: int) -> None:
    body = json.dumps({"model": "tiny", "prompt": "x" * size})
    assert refused(server.post(PLAIN, body), 413)["code"] == "body_too_large"


def test_an_oversized_body_in_chunks(server: Running) -> None:
    parts = (b"x" * (1 << 20) for _ in range(6))
    refused(httpx.post(f"{server.address}{PLAIN}", content=parts), 413)


def test_unknown_paths_and_methods(server: Running) -> None:
    refused(httpx.get(f"{server.address}/v1/nothing"), 404)
    refused(httpx.get(f"{server.address}{CHAT}"), 405)
    refused(httpx.post(f"{server.address}/metrics"), 405)
    refused(server.post(f"{PLAIN}/", {"model": "tiny", "prompt": "x"}), 404)


def test_the_server_is_as_before(server: Running) -> None:
    found = server.idle()
    assert found["hal_requests_total:failed"] == 0
    assert found["hal_cache_pages_in_use"] == 0
    answer = server.post(PLAIN, {"model": "tiny", "prompt": "Hello", "max_tokens": 3})
    assert answer.status_code == 200
