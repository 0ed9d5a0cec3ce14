from __future__ import annotations

import pytest

from hal import InputError
from hal.passes.quantize import parse_format, parse_recipe


@pytest.mark.parametrize(
    ("text", "bits", "group", "symmetric", "activations"),
    [
        ("w4a16", 4, 32, True, 16),
        ("w8a8-g64", 8, 64, True, 8),
        ("W3A16-Asym", 3, 32, False, 16),
        ("w2-channel", 2, 0, True, 16),
        ("ternarya8-g16", 2, 16, True, 8),
        ("fp8-channel", 8, 0, True, 16),
        ("mxfp4a8", 4, 32, True, 8),
    ],
)
def test_a_format_is_read_from_its_name(
    text: str, bits: int, group: int, symmetric: bool, activations: int
) -> None:
    form = parse_format(text)
    assert (form.bits, form.group, form.symmetric, form.activations) == (
        bits,
        group,
        symmetric,
        activations,
    )
    assert parse_format(str(form)) == form


def test_head_and_embedding_keep_eight_bits_unless_told_otherwise() -> None:
    recipe = parse_recipe("w4a8-g64:hqq")
    assert str(recipe.head) == "w8a8-g32:rtn"
    assert str(recipe.embedding) == "w8a16-g32:rtn"
    recipe = parse_recipe("w4a16, head=w4a16:hqq, embedding=float")
    assert str(recipe.head) == "w4a16-g32:hqq"
    assert recipe.embedding is None
    assert parse_recipe(str(recipe)) == recipe


def test_experts_are_symmetric_and_eight_bits_have_a_scale_for_each_row() -> None:
    assert str(parse_recipe("w4a8-asym").experts) == "w4a8-g32:rtn"
    assert str(parse_recipe("w8a8").experts) == "w8a8-channel:rtn"


@pytest.mark.parametrize(
    "text",
    ["", "w5a16", "w4a16-g31", "w4a16-soft", "w4a16:magic", "w4a16,tail=w8a16", "ternary-asym",
     "fp8a8", "mxfp4-asym", "mxfp4-g64", "fp8-asym", "w4a16,head", "w4a16 w8a8"],
)  # fmt: skip
def test_what_does_not_parse_is_an_error_with_a_hint(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_recipe(text)
    assert caught.value.hint
