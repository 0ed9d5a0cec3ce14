"""Agreement of two sets of embeddings, and the sentences that come with hal."""

from __future__ import annotations

from collections import Counter
from types import ModuleType

import numpy as np
import pytest

from tests.examples.conftest import Load


@pytest.fixture(scope="module")
def script(load: Load) -> ModuleType:
    return load("compare_embeddings")


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_the_sentences_are_200_in_20_topics_and_none_twice(script: ModuleType) -> None:
    sentences, topics = script.read_sentences()
    assert len(set(sentences)) == 200
    assert set(Counter(topics).values()) == {10}
    assert len(set(topics)) == 20


def test_equal_embeddings_agree_entirely_and_noise_lowers_every_figure(script: ModuleType) -> None:
    random = np.random.default_rng(0)
    centres = random.standard_normal((4, 16))
    topics = [str(i % 4) for i in range(40)]
    rows = unit(np.repeat(centres[None], 10, 0).reshape(40, 16) + random.normal(0, 0.3, (40, 16)))
    same = script.compare(rows, rows, topics)
    assert (same.same_nearest, same.overlap, same.order) == (1.0, 1.0, 1.0)
    assert same.cosine == pytest.approx(1.0)
    assert same.topic == same.reference_topic > 0.9
    noisy = script.compare(rows, unit(rows + random.normal(0, 0.05, rows.shape)), topics)
    assert noisy.cosine_min < noisy.cosine < 1
    assert noisy.same_nearest < 1
    assert 0.5 < noisy.order < 1
    assert noisy.overlap < 1


def test_the_order_is_spearmans(script: ModuleType) -> None:
    random = np.random.default_rng(1)
    a, b = (unit(random.standard_normal((30, 8))) for _ in range(2))
    expected = []
    for row in range(30):
        others = np.delete(np.arange(30), row)
        ranks = [np.argsort(np.argsort(-(e[others] @ e[row]))) for e in (a, b)]
        expected.append(np.corrcoef(*ranks)[0, 1])
    assert script.compare(a, b, ["x"] * 30).order == pytest.approx(np.mean(expected))
