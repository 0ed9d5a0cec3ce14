"""What OpenAI's own Python client sees."""

from __future__ import annotations

from pathlib import Path

import httpx
import openai
import pytest

import hal
from tests.server.running import Running

MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is a list?"},
]


@pytest.fixture(scope="module")
def alone(bundle: Path) -> hal.Session:
    return hal.load(bundle).session()


def test_a_chat_is_answered(server: Running, alone: hal.Session) -> None:
    answer = server.client().chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_tokens=12
    )
    steps = alone.generate(MESSAGES, max_new_tokens=12)
    choice = answer.choices[0]
    assert choice.message.content == steps.text()
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(steps.prompt_ids)
    assert answer.usage.completion_tokens == 12
    assert answer.object == "chat.completion"


def test_a_chat_is_streamed(server: Running, alone: hal.Session) -> None:
    stream = server.client().chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        temperature=0,
        max_completion_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    deltas = [c.choices[0].delta for c in chunks if c.choices]
    assert deltas[0].role == "assistant"
    assert (
        "".join(d.content or "" for d in deltas)
        == alone.generate(MESSAGES, max_new_tokens=12).text()
    )
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert not chunks[-1].choices
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    assert len({c.id for c in chunks}) == 1
    assert len(chunks) > 6


def test_content_in_parts_and_the_developers_role_are_understood(server: Running) -> None:
    def ask(role: str, content: object) -> str | None:
        messages = [{"role": role, "content": "Be short."}, {"role": "user", "content": content}]
        answer = server.client().chat.completions.create(
            model="tiny", messages=messages, temperature=0, max_tokens=8
        )
        return answer.choices[0].message.content

    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "a list?"}]
    assert ask("developer", parts) == ask("system", "What is a list?")


def test_prompts_are_completed_each_by_itself(server: Running, alone: hal.Session) -> None:
    prompts = ["The for statement", "A class is"]
    answer = server.client().completions.create(
        model="tiny", prompt=prompts, temperature=0, max_tokens=10
    )
    expected = [alone.generate(p, max_new_tokens=10).text() for p in prompts]
    assert [c.text for c in answer.choices] == expected
    assert [c.index for c in answer.choices] == [0, 1]
    # Without a temperature of 0, an end of text may be drawn earlier.
    default = server.client().completions.create(model="tiny", prompt=[5, 6, 7], temperature=0)
    assert default.usage is not None
    assert (default.usage.prompt_tokens, default.usage.completion_tokens) == (3, 16)


def test_a_completion_is_streamed(server: Running, alone: hal.Session) -> None:
    stream = server.client().completions.create(
        model="tiny", prompt="The for statement", temperature=0, max_tokens=10, stream=True
    )
    text = "".join(c.choices[0].text for c in stream)
    assert text == alone.generate("The for statement", max_new_tokens=10).text()


def test_several_answers_differ_and_repeat_with_their_seed(server: Running) -> None:
    def draw() -> list[str]:
        answer = server.client().completions.create(
            model="tiny", prompt="The", temperature=1.2, top_p=0.9, n=3, seed=5, max_tokens=8
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == 1
        return [c.text for c in answer.choices]

    first = draw()
    assert first == draw()
    assert len(set(first)) == 3


def test_a_stop_string_ends_the_text(server: Running) -> None:
    client = server.client()
    whole = client.completions.create(model="tiny", prompt="The", temperature=0, max_tokens=20)
    text = whole.choices[0].text
    stop = text[8:11]
    cut = client.completions.create(
        model="tiny", prompt="The", temperature=0, max_tokens=20, stop=[stop]
    )
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_models_are_listed(server: Running) -> None:
    client = server.client()
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")


def test_health_and_metrics_are_open(server: Running) -> None:
    health = httpx.get(f"{server.address}/health").json()
    assert health == {"status": "ok", "model": "tiny", "target": "host:tvm"}
    before = server.idle()
    server.client().completions.create(model="tiny", prompt="The", max_tokens=9)
    after = server.idle()
    grown = {name: after[name] - before[name] for name in after}
    assert grown["hal_requests_total:finished"] == 1
    assert grown["hal_prompt_tokens_total"] == 1
    assert grown["hal_generated_tokens_total"] == 9
    assert grown["hal_time_to_first_token_seconds_count"] == 1
    assert grown["hal_time_per_token_seconds_count"] == 8
    assert after["hal_cache_pages_in_use"] == 0


def test_a_conversation_reuses_its_pages(server: Running) -> None:
    before = server.idle()["hal_reused_tokens_total"]
    messages = [{"role": "user", "content": "Tell me about lists and tuples. " * 4}]
    client = server.client()
    for _ in range(2):
        answer = client.chat.completions.create(
            model="tiny", messages=messages, temperature=0, max_tokens=8
        )
        content = answer.choices[0].message.content
        messages += [
            {"role": "assistant", "content": content or ""},
            {"role": "user", "content": "Go on."},
        ]
    found = server.idle()
    assert found["hal_reused_tokens_total"] - before >= 32
    assert found["hal_prefix_cache_rows"] > 0
    assert found["hal_cache_pages_in_use"] == 0


def test_a_language_model_gives_no_embeddings(server: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="gives no embeddings"):
        server.client().embeddings.create(model="tiny", input="text")
