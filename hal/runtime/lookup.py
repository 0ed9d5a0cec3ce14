"""Guesses for the next tokens from what the text said before: prompt look-up decoding.

A model that repeats its context (quoting, summarizing, editing code) is run on several guessed
tokens at once, and the ones that it agrees with are kept; see :mod:`hal.runtime.decoding`.
"""

from __future__ import annotations

from collections.abc import Iterable

LONGEST, SHORTEST = 3, 2
"""Lengths of the sequences that are looked up; a single token repeats too often by chance."""


class PromptLookup:
    """Finds where the latest tokens occurred before and copies what followed.

    Args:
        ids: the tokens so far.
    """

    def __init__(self, ids: Iterable[int]) -> None:
        self._ids: list[int] = []
        self._followed: dict[tuple[int, ...], int] = {}  # sequence -> index of what came after it
        for token in ids:
            self.append(token)

    def append(self, token: int) -> None:
        """Add the token that came next."""
        end = len(self._ids)
        for length in range(SHORTEST, LONGEST + 1):
            if end >= length:
                self._followed[tuple(self._ids[end - length :])] = end
        self._ids.append(token)

    def draft(self, count: int) -> list[int]:
        """Up to ``count`` guesses; empty if the latest tokens are new."""
        end = len(self._ids)
        for length in range(min(LONGEST, end), SHORTEST - 1, -1):
            start = self._followed.get(tuple(self._ids[end - length :]))
            if start is None:
                continue
            guess: list[int] = []
            for at in range(start, start + count):
                # A repetition that reaches the end of the text goes on into the guess itself.
                guess.append(self._ids[at] if at < end else guess[at - end])
            return guess
        return []
