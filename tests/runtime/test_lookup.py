"""Prompt look-up guesses what followed the latest tokens before."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hal.runtime.lookup import PromptLookup


def test_what_followed_the_latest_tokens_is_guessed() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 9, 2, 3])
    assert lookup.draft(2) == [4, 5]
    lookup.append(4)
    assert lookup.draft(3) == [5, 9, 2]


def test_new_text_gives_no_guess() -> None:
    assert PromptLookup([1, 2, 3, 4]).draft(4) == []
    assert PromptLookup([1, 1]).draft(4) == []
    assert PromptLookup([]).draft(4) == []


def test_the_longest_match_counts_and_of_those_the_latest() -> None:
    assert PromptLookup([1, 2, 3, 7, 9, 2, 3, 8, 1, 2, 3]).draft(1) == [7]
    assert PromptLookup([1, 2, 3, 7, 1, 2, 3, 8, 1, 2, 3]).draft(1) == [8]


def test_a_repetition_is_guessed_to_go_on() -> None:
    assert PromptLookup([5, 1, 2, 1, 2, 1, 2]).draft(5) == [1, 2, 1, 2, 1]


@given(ids=st.lists(st.integers(0, 3), max_size=40), count=st.integers(0, 8))
def test_a_guess_is_what_some_earlier_occurrence_says(ids: list[int], count: int) -> None:
    guess = PromptLookup(ids).draft(count)
    assert len(guess) in (0, count)
    whole = ids + guess
    period = next((p for p in range(1, len(ids)) if ids[-2:] == ids[-2 - p : len(ids) - p]), None)
    if guess:
        assert period is not None
        assert any(
            all(whole[i] == whole[i - p] for i in range(len(ids) - 2, len(whole)))
            for p in range(1, len(ids) - 1)
        )
    elif count and len(ids) > 2:
        assert period is None
