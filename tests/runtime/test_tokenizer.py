"""hal.runtime.tokenizer: text that arrives in pieces is the text that arrives at once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, pre_tokenizers

from hal.runtime.tokenizer import TextStream, Tokenizer


def byte_level() -> Tokenizer:
    """A tokenizer with one token per byte, so that characters span several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Inner(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return Tokenizer(inner)


@given(st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=30))
def test_streamed_pieces_join_to_the_whole_text(text: str) -> None:
    tokenizer = byte_level()
    stream = TextStream(tokenizer)
    ids = tokenizer.encode(text)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == text


def test_half_a_character_is_held_back_until_the_end() -> None:
    tokenizer = byte_level()
    stream = TextStream(tokenizer)
    first, *_ = tokenizer.encode("é")
    assert stream.push(first) == ""
    assert stream.flush() == "\ufffd"


def test_a_stream_after_a_prompt_keeps_the_space_between_them() -> None:
    inner = Inner(models.WordLevel({"▁for": 0, "▁statement": 1}))
    inner.decoder = decoders.Metaspace()
    stream = TextStream(Tokenizer(inner), before=[0])
    assert stream.push(1) == " statement"


def test_padding_and_truncation_of_the_file_do_not_touch_a_prompt() -> None:
    inner = Inner(models.WordLevel({"a": 0, "[PAD]": 1}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.enable_padding(pad_id=1, length=8)
    inner.enable_truncation(2)
    assert Tokenizer(inner).encode("a a a") == [0, 0, 0]
