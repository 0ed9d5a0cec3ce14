"""What rounding the cache costs on a model that was trained."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

import numpy as np
import pytest

import hal
from hal.runtime.tokenizer import Tokenizer

MODEL = Path(__file__).parent.parent / "examples" / "demo_model"
ROUTE = "host:onnxruntime"
TOKENS = 512


@pytest.fixture(scope="module")
def exact() -> tuple[hal.Bundle, list[int], np.ndarray, int]:
    """A bundle, tokens of a text, the best token after each, and bytes that a token takes."""
    bundle = hal.compile(MODEL, target=ROUTE, verify=False)
    topics = pydoc_data.topics.topics
    text = topics["for"] + topics["class"] + topics["with"]
    ids = Tokenizer.from_bundle(bundle.files).encode(text)[:TOKENS]
    assert len(ids) == TOKENS
    session = bundle.session()
    assert session.plan is not None
    return bundle, ids, session.logits(ids).argmax(-1), session.plan.token_bytes()


@pytest.mark.parametrize(
    ("width", "agreement", "share"), [("int8", 0.99, 0.3), ("int4", 0.97, 0.2)]
)
def test_best_tokens_stay_and_bytes_shrink(
    exact: tuple[hal.Bundle, list[int], np.ndarray, int], width: str, agreement: float, share: float
) -> None:
    bundle, ids, best, token_bytes = exact
    session = bundle.retarget(ROUTE, kv_cache=width, verify=False).session()
    assert session.plan is not None
    assert (session.logits(ids).argmax(-1) == best).mean() >= agreement
    assert session.plan.token_bytes() <= share * token_bytes
