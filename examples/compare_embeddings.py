"""How two bundles of one text encoder differ: python examples/compare_embeddings.py A.hal B.hal

Both embed the sentences of `benchmarks/data/sentences.txt` (200 sentences in 20 topics), or of a
file like it. Each sentence then searches for its like among the others, and the orders in which the
two bundles find them are compared. With one bundle, only its own search is judged, by the topics.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np

import hal
from hal.runtime.embedding import Embedder

SENTENCES = Path(__file__).resolve().parents[1] / "benchmarks" / "data" / "sentences.txt"


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How alike two sets of embeddings are, and what a search finds with them.

    Attributes:
        cosine: mean of the cosine of a sentence's two embeddings, and
        cosine_min: the worst.
        same_nearest: share of sentences that find the same other sentence first.
        overlap: share of the ten nearest that both find.
        order: Spearman's rank correlation of the orders of all others, mean over sentences.
        topic: share of sentences whose nearest has their topic, with the second embeddings, and
        reference_topic: with the first.
    """

    cosine: float
    cosine_min: float
    same_nearest: float
    overlap: float
    order: float
    topic: float
    reference_topic: float


def read_sentences(path: Path = SENTENCES) -> tuple[list[str], list[str]]:
    """Sentences, and the topic of each: a line `# topic` stands before its sentences."""
    sentences, topics = [], []
    topic = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            topic = line[2:]
        elif line:
            sentences.append(line)
            topics.append(topic)
    return sentences, topics


def embed(bundle: hal.Bundle, sentences: list[str], target: str | None = None) -> np.ndarray:
    """Embeddings of length 1, float32 `[sentences, width]`."""
    with bundle.session(target) as session:
        return Embedder(session).embed(sentences)[0]


def orders(embeddings: np.ndarray) -> np.ndarray:
    """For each row the others by falling cosine, int64 `[n, n - 1]`."""
    likeness = embeddings @ embeddings.T
    np.fill_diagonal(likeness, np.inf)
    return np.argsort(-likeness, axis=1, kind="stable")[:, 1:]


def compare(reference: np.ndarray, other: np.ndarray, topics: list[str]) -> Agreement:
    """Figures for two sets of embeddings of the same sentences, `[n, width]` each, n > 10."""
    cosines = (reference * other).sum(-1)
    a, b = orders(reference), orders(other)
    count = a.shape[1]
    # Sorting by index gives, sentence by sentence, its place in an order.
    squares = ((np.argsort(a, axis=1) - np.argsort(b, axis=1)) ** 2).sum(1)
    order = 1 - 6 * squares / (count * (count**2 - 1))
    common = [len(set(x) & set(y)) / 10 for x, y in zip(a[:, :10], b[:, :10], strict=True)]
    names = np.array(topics)
    return Agreement(
        cosine=float(cosines.mean()),
        cosine_min=float(cosines.min()),
        same_nearest=float((a[:, 0] == b[:, 0]).mean()),
        overlap=float(np.mean(common)),
        order=float(order.mean()),
        topic=float((names[b[:, 0]] == names).mean()),
        reference_topic=float((names[a[:, 0]] == names).mean()),
    )


def main() -> None:
    first, *more = sys.argv[1:]
    paths = [first, more[0] if more else first]
    sentences, topics = read_sentences()
    embeddings = [embed(hal.load(path), sentences) for path in paths]
    for name, value in dataclasses.asdict(compare(*embeddings, topics)).items():
        print(f"{name:<16} {value:.6f}")


if __name__ == "__main__":
    main()
