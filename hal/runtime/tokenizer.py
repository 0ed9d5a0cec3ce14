"""The bundle's own tokenizer, without transformers."""

from __future__ import annotations

import weakref

import tokenizers

from hal.bundle.files import BundleFiles
from hal.errors import InputError

TOKENIZER_FILE = "tokenizer/tokenizer.json"


class Tokenizer:
    """Text to token ids and back, from ``tokenizer/tokenizer.json`` of a bundle."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        # What the file was last used with; a prompt is neither padded nor cut.
        inner.no_padding()
        inner.no_truncation()
        self._inner = inner

    @classmethod
    def from_bundle(cls, files: BundleFiles) -> Tokenizer:
        """Read the bundle's tokenizer.

        Raises:
            InputError: the bundle has none.
        """
        if files in _READ:
            return _READ[files]
        if TOKENIZER_FILE not in files:
            raise InputError(
                "the bundle has no tokenizer",
                "pass token ids instead of text, or compile from a directory with a tokenizer.json",
            )
        found = cls(tokenizers.Tokenizer.from_str(files.read(TOKENIZER_FILE).decode()))
        _READ[files] = found
        return found

    def to_json(self) -> str:
        """The tokenizer as the text of a ``tokenizer.json``."""
        return str(self._inner.to_str())

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``.

        Args:
            text: special tokens that are written out in it become their ids.
            add_special_tokens: add those that the tokenizer puts around a text by itself. A
                rendered chat has them already.
        """
        return list(self._inner.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids`` without special tokens."""
        return str(self._inner.decode(ids, skip_special_tokens=True))


_READ: weakref.WeakKeyDictionary[BundleFiles, Tokenizer] = weakref.WeakKeyDictionary()
"""Tokenizers of bundles that are open: reading a large one takes a second."""


class TextStream:
    """Turns a stream of ids into pieces of text, holding back bytes of unfinished characters.

    ``before`` are ids that come before the stream and are not part of it (a prompt): decoders treat
    the first token of a text differently, so the stream must not begin with its own first token.
    """

    def __init__(self, tokenizer: Tokenizer, before: list[int] | None = None) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._settled = 0  # ids before this one are out already and only give context
        self._sent = ""
        context = (before or [])[-1:]
        text = tokenizer.decode(context)
        if text and not text.endswith("\ufffd"):
            self._ids, self._sent = context, text

    def push(self, token: int) -> str:
        """Add one id; return the text that is complete now (often empty)."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids[self._settled :])
        if text.endswith("\ufffd"):
            return ""
        piece = text[len(self._sent) :]
        # Decode from a recent id on, so that a long text is not decoded again for every token.
        self._settled = len(self._ids) - 1
        self._sent = self._tokenizer.decode(self._ids[self._settled :])
        return piece

    def flush(self) -> str:
        """Text that was held back, incomplete characters as U+FFFD."""
        return self._tokenizer.decode(self._ids[self._settled :])[len(self._sent) :]
