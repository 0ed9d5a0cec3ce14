"""Prompts and ids that no language model can take are refused with a sentence."""

from __future__ import annotations

import pytest

from hal.errors import InputError
from hal.runtime.generate import _valid_ids, _valid_text


@pytest.mark.parametrize("prompt", [[1.5], [[1, 2], [3, 4]], ["a"], None, b"abc"])
def test_prompts_that_are_no_single_list_of_ids_are_refused(prompt: object) -> None:
    with pytest.raises(InputError):
        _valid_ids(prompt)


def test_one_row_of_ids_is_a_prompt() -> None:
    assert _valid_ids([[1, 2]]) == [1, 2]
    assert _valid_ids([]) == []


def test_lone_surrogates_are_no_text() -> None:
    with pytest.raises(InputError, match="not valid Unicode"):
        _valid_text("\ud800")
