"""Stop strings end the text at the same place however it is cut into pieces."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hal.errors import InputError
from hal.runtime.stopping import StopStrings, checked_stops

TEXT = st.text("abc", max_size=30)
STOPS = st.lists(st.text("abc", min_size=1, max_size=5), max_size=4)


def run(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    stopping = StopStrings(stops)
    text = "".join(stopping.push(piece) for piece in pieces)
    return text + stopping.flush(), stopping.stopped


@given(text=TEXT, stops=STOPS, cuts=st.lists(st.integers(0, 30)))
def test_where_the_pieces_are_cut_makes_no_difference(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    bounds = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(bounds)]
    assert run(pieces, stops) == run(list(text), stops) == run([text], stops)


@given(text=TEXT, stops=STOPS)
def test_the_text_ends_before_the_stop_string_that_is_complete_first(
    text: str, stops: list[str]
) -> None:
    expected, stopped = text, False
    for end in range(len(text) + 1):
        ending = [s for s in stops if text[:end].endswith(s)]
        if ending:
            expected, stopped = text[: end - max(map(len, ending))], True
            break
    assert run([text], stops) == (expected, stopped)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    stopping = StopStrings(["\n\nQ:"])
    assert stopping.push("a\n") == "a"
    assert stopping.push("b\n\n") == "\nb"
    assert stopping.push("Q") == ""
    assert stopping.push("!") == "\n\nQ!"
    assert not stopping.stopped


def test_nothing_comes_after_a_stop_string() -> None:
    stopping = StopStrings(["x"])
    assert stopping.push("axb") == "a"
    assert stopping.push("c") == ""
    assert stopping.flush() == ""


def test_a_string_a_list_or_nothing_are_stop_strings() -> None:
    assert checked_stops("ab") == ("ab",)
    assert checked_stops(["a", "b"]) == ("a", "b")
    assert checked_stops(None) == ()


@pytest.mark.parametrize("stop", ["", ["a", ""], 5, [5], b"a", {"a": 1}])
def test_other_stop_strings_are_refused(stop: Any) -> None:
    with pytest.raises(InputError, match="stop is"):
        checked_stops(stop)
