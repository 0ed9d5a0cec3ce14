"""The text that the demonstration model learns, its tokenizer and its training batches."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pydoc_data.topics import topics as documentation_topics
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from train_demo_model import Recipe

END_OF_TEXT, END_OF_TEXT_ID = "<|endoftext|>", 0
PADDING, PADDING_ID = "<|padding|>", 1

HELD_OUT_TOPICS = frozenset(
    {"import", "raise", "slicings", "integers", "truth", "bitwise", "yield", "lists"}
)
"""Topics never trained on. None of their paragraphs is left in the training text either."""


@dataclass(frozen=True)
class Corpus:
    """Training and held-out topics: name to text."""

    train: dict[str, str]
    held_out: dict[str, str]


def paragraphs(text: str) -> list[str]:
    """Paragraphs of `text` long enough to tell two topics apart."""
    stripped = (paragraph.strip() for paragraph in re.split(r"\n\s*\n", text))
    return [paragraph for paragraph in stripped if len(paragraph) > 60]


def load_corpus() -> Corpus:
    """Read the documentation topics and set the held-out ones apart.

    Many topics are excerpts of longer ones ("if" is a part of "compound"). A topic is left out of
    the training text when it shares a paragraph with a held-out topic, or when most of it stands
    in a longer topic.
    """
    missing = HELD_OUT_TOPICS - documentation_topics.keys()
    if missing:
        raise SystemExit(f"this Python has no documentation topics named {sorted(missing)}")
    texts = {name: text.strip() + "\n" for name, text in documentation_topics.items()}
    held_out = {name: texts.pop(name) for name in sorted(HELD_OUT_TOPICS)}
    held_out_paragraphs = {own for text in held_out.values() for own in paragraphs(text)}
    train: dict[str, str] = {}
    seen: set[str] = set()
    for name, text in sorted(texts.items(), key=lambda item: (-len(item[1]), item[0])):
        own = paragraphs(text)
        repeated = sum(len(paragraph) for paragraph in own if paragraph in seen)
        if held_out_paragraphs.isdisjoint(own) and repeated < 0.5 * len(text):
            train[name] = text
            seen.update(own)
    return Corpus(train=train, held_out=held_out)


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer; decoding gives back every space and line break."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    for text in texts:
        if tokenizer.decode(tokenizer.encode(text).ids) != text:
            raise RuntimeError("the tokenizer does not give back the text it encoded")
    return tokenizer


class TrainingText:
    """An endless stream of training tokens.

    Each pass over the texts shuffles them, encodes them anew and joins them with the end-of-text
    token; windows over that stream start at a random offset and come in random order.
    """

    def __init__(
        self, texts: list[str], tokenizer: Tokenizer, recipe: Recipe, generator: torch.Generator
    ) -> None:
        """Read `texts` with a copy of `tokenizer`; `generator` decides the order."""
        self._texts = texts
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._recipe = recipe
        self._generator = generator
        self._windows: list[torch.Tensor] = []
        self._finishing = False

    def batch(self, finishing: bool) -> torch.Tensor:
        """Token ids of the next `batch_tokens` tokens, `[batch_tokens / window, window]`.

        The window is the recipe's `context` when `finishing`, its `short_context` before.
        """
        recipe = self._recipe
        window = recipe.context if finishing else recipe.short_context
        rows = []
        for _ in range(recipe.batch_tokens // window):
            if not self._windows or finishing != self._finishing:
                self._finishing = finishing
                self._tokenizer.model.dropout = None if finishing else recipe.bpe_dropout
                self._windows = self._pass(window)
            rows.append(self._windows.pop())
        return torch.stack(rows)

    def _pass(self, window: int) -> list[torch.Tensor]:
        """Windows that go over every text once, each `[window]`."""
        stream: list[int] = []
        for index in torch.randperm(len(self._texts), generator=self._generator).tolist():
            stream += [END_OF_TEXT_ID, *self._tokenizer.encode(self._texts[index]).ids]
        offset = int(torch.randint(window, (1,), generator=self._generator))
        windows = torch.tensor(stream)[offset:].unfold(0, window, window)
        return list(windows[torch.randperm(len(windows), generator=self._generator)])
