from __future__ import annotations

import pytest

from hal import InputError
from hal.quantization import parse_budget, parse_request, parse_size


def test_bounds_are_read_and_compared() -> None:
    top1, kl, ppl = parse_budget("top1>=0.99, KL <= 2e-2,ppl<=1.01x")
    assert top1.met({"top1": 0.995})
    assert not top1.met({"top1": 0.98})
    assert kl.met({"kl": 0.02})
    assert not ppl.met({"ppl": float("nan")})
    assert str(ppl) == "ppl<=1.01x"


@pytest.mark.parametrize(
    "text",
    ["", "top1", "top1<=0.99", "kl>=0.1", "top2>=0.9", "top1>=1.5", "kl<=0.1x", "ppl<=0.9x",
     "cosine>=0", "kl<=1.2.3", "kl<=0.1 ppl<=1.1"],
)  # fmt: skip
def test_a_budget_that_does_not_parse_is_an_error_with_a_hint(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_budget(text)
    assert caught.value.hint


def test_a_metric_that_the_model_does_not_have_is_named() -> None:
    with pytest.raises(InputError, match="ppl"):
        parse_budget("ppl<=1.1x")[0].met({"cosine": 1.0})


@pytest.mark.parametrize(
    ("text", "size"),
    [("300MB", 300_000_000), ("1.5GiB", 3 << 29), ("800000", 800_000), ("2k", 2000)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-3MB", "12 apples", "1.2.3MB"])
def test_a_size_that_does_not_parse_is_an_error(text: str) -> None:
    with pytest.raises(InputError, match="size budget"):
        parse_size(text)


@pytest.mark.parametrize(
    "options",
    [
        {"quantize": None, "accuracy_budget": "kl<=0.1"},
        {"quantize": None, "calibration": "text.txt"},
        {"quantize": "w4a16", "accuracy_budget": "kl<=0.1"},
        {"quantize": "w4a16:gptq"},
        {"quantize": "w4a16,head=w8a16:awq"},
        {"quantize": "float", "size_budget": "1MB", "calibration": "text.txt"},
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(InputError):
        parse_request(**options)


def test_a_bound_is_told_as_it_was_given() -> None:
    assert str(parse_budget("cosine>=0.9999999")[0]) == "cosine>=0.9999999"
