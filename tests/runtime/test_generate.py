"""Generation on a session without a model: options, stopping, limits, batches, look-up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hal.errors import InputError, UnsupportedError
from hal.runtime.generate import generate, generate_batch, teacher_forced_logits
from tests.runtime.fake_session import END, VOCABULARY, FakeSession, OneRowSession


def says(text: str, prompt: str = "p", **metadata: Any) -> Any:
    """A session that continues ``prompt`` with ``text``, over and over."""
    session: Any = FakeSession(text, **metadata)
    session.prompt = len(prompt.encode())
    return session


def cannot_go_back(length: int) -> None:
    raise UnsupportedError("the state cannot go back")


def fake(**metadata: Any) -> Any:
    return FakeSession(**metadata)


# -- one prompt -------------------------------------------------------------------------------


def test_a_text_prompt_gives_text_and_ids_give_ids() -> None:
    assert generate(says("hello "), "p", max_new_tokens=8).text() == "hello he"
    steps = generate(says("hello "), [112], max_new_tokens=3)
    assert list(steps) == [104, 101, 108]
    assert steps.prompt_ids == [112]
    assert steps.held_ids == [112, 104, 101]
    assert list(generate(says("ab"), np.array([[112]], np.int32), max_new_tokens=1)) == [97]


def test_ids_give_text_and_text_gives_ids_if_asked() -> None:
    assert generate(says("abc"), [112], max_new_tokens=4, as_text=True).text() == "abca"
    assert list(generate(says("abc"), "p", max_new_tokens=2, as_text=False)) == [97, 98]
    batch = generate_batch(says("abc"), [[112], "q"], max_new_tokens=2, as_text=True)
    assert [row.text for row in batch] == ["ab", "ab"]


def test_the_length_ends_a_text_with_that_reason() -> None:
    steps = generate(says("abc"), "p", max_new_tokens=5)
    assert steps.finish_reason is None
    assert steps.text() == "abcab"
    assert steps.finish_reason == "length"


def test_a_stop_token_ends_the_text_and_gives_none() -> None:
    steps = generate(says("abc"), "p", stop_token_ids=ord("c"))
    assert steps.text() == "ab"
    assert steps.token_ids == [97, 98, 99]
    assert steps.finish_reason == "stop"
    session = says("abc", eos_token_ids=[98])
    assert list(generate(session, [1])) == [97, 98]
    assert list(generate(session, [1], stop_token_ids=[], max_new_tokens=3)) == [97, 98, 99]


def test_a_stop_string_over_several_tokens_is_cut_off() -> None:
    steps = generate(says("one. two. three. "), "p", stop=["two", "ee."])
    pieces = list(steps)
    assert "".join(pieces) == "one. "
    assert steps.finish_reason == "stop"
    assert bytes(steps.token_ids) == b"one. two"
    assert len(pieces) == len(steps.token_ids)


def test_a_stop_string_also_ends_ids() -> None:
    assert bytes(generate(says("one. two. "), [112], stop=". t")) == b"one. t"


def test_a_stop_string_that_never_comes_is_no_error() -> None:
    steps = generate(says("abc"), "p", stop="cab!", max_new_tokens=6)
    assert steps.text() == "abcabc"
    assert steps.finish_reason == "length"


def test_characters_of_several_bytes_come_whole() -> None:
    pieces = list(generate(says("né"), "p", max_new_tokens=5))
    assert pieces == ["n", "", "é", "n", "\ufffd"]


@given(stop=st.text("ab", min_size=1, max_size=4), script=st.text("ab", min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_streamed_text_ends_where_the_whole_text_has_the_stop_string(
    stop: str, script: str
) -> None:
    text = generate(says(script), "p", stop=stop, max_new_tokens=20).text()
    whole = (script * 20)[:20]
    assert text == whole.partition(stop)[0]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, None])
def test_the_prompt_is_run_in_chunks_with_the_same_result(chunk: int | None) -> None:
    session = fake()
    prompt = [5, 9, 200, 7, 7, 31, 2]
    tokens = list(generate(session, prompt, max_new_tokens=5, prefill_chunk=chunk))
    assert tokens == list(generate(fake(), prompt, max_new_tokens=5))
    assert max(counts[0] for counts in session.calls) == min(chunk or 512, 7)


def test_a_seed_repeats_a_draw() -> None:
    def draw(seed: int) -> list[int]:
        return list(generate(fake(), [1], temperature=1.5, top_k=50, seed=seed, max_new_tokens=20))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_statistics_tell_tokens_and_rates() -> None:
    steps = generate(fake(), [1, 2, 3], max_new_tokens=4)
    assert steps.stats()["prefill_tokens_per_second"] is None
    list(steps)
    stats = steps.stats()
    assert (stats["prompt_tokens"], stats["new_tokens"]) == (3, 4)
    assert stats["prefill_tokens_per_second"] > 0
    assert stats["decode_tokens_per_second"] > 0
    assert stats["prefill_seconds"] == steps.seconds_to_first_token
    assert stats["finish_reason"] == "length"


# -- the state --------------------------------------------------------------------------------


def test_what_the_state_holds_already_is_not_run_again() -> None:
    session = fake()
    first = generate(session, [1, 2, 3], max_new_tokens=3)
    list(first)
    prompt = [1, 2, 3, first.token_ids[0], 77, 78]
    session.calls.clear()
    second = generate(session, prompt, max_new_tokens=3, held=first.held_ids)
    tokens = list(second)
    assert session.calls[0] == [2]
    assert second.stats()["reused_tokens"] == 4
    assert tokens == list(generate(fake(), prompt, max_new_tokens=3))


def test_the_last_token_of_a_prompt_is_run_even_if_it_is_held() -> None:
    session = fake()
    first = generate(session, [1, 2, 3], max_new_tokens=1)
    expected = list(first)
    assert list(generate(session, [1, 2, 3], max_new_tokens=1, held=first.held_ids)) == expected


def test_a_state_that_cannot_go_back_is_built_anew() -> None:
    session = fake()
    first = generate(session, [1, 2, 3], max_new_tokens=3)
    list(first)
    session.trim = cannot_go_back
    tokens = list(generate(session, [1, 9], max_new_tokens=3, held=first.held_ids))
    assert tokens == list(generate(fake(), [1, 9], max_new_tokens=3))


def test_held_ids_that_are_not_those_of_the_state_are_refused() -> None:
    with pytest.raises(InputError, match="2 held ids are given, the session's state has 0"):
        list(generate(fake(), [1, 2, 3], held=[1, 2]))


def test_a_session_that_is_used_in_between_is_an_error() -> None:
    session = fake()
    first = generate(session, [1, 2, 3])
    next(first)
    list(generate(session, [5], max_new_tokens=2))
    with pytest.raises(InputError, match="the session is at position 2"):
        next(first)


# -- prompt look-up ---------------------------------------------------------------------------


@given(
    prompt=st.lists(st.integers(0, 3), min_size=1, max_size=12),
    draft=st.integers(1, 6),
    temperature=st.sampled_from([0.0, 0.3]),
    script=st.sampled_from([None, "abcd", "aab"]),
)
@settings(max_examples=60, deadline=None)
def test_look_up_changes_nothing_but_the_number_of_runs(
    prompt: list[int], draft: int, temperature: float, script: str | None
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 17, "temperature": temperature, "seed": 3}
    plain: Any = FakeSession(script)
    ahead: Any = FakeSession(script)
    steps = generate(ahead, prompt, prompt_lookup=draft, **options)
    assert list(steps) == list(generate(plain, prompt, **options))
    assert ahead.rows == plain.rows == [steps.held_ids]
    assert len(ahead.calls) <= len(plain.calls)
    assert len(plain.calls) - len(ahead.calls) == steps.counts.kept


def test_look_up_saves_runs_on_text_that_repeats() -> None:
    session = says("the cat. ")
    steps = generate(session, "p", max_new_tokens=90, prompt_lookup=8)
    assert steps.text() == "the cat. " * 10
    assert len(session.calls) < 25
    assert steps.stats()["guessed_tokens_kept"] == 90 - len(session.calls)


def test_look_up_goes_on_without_guesses_where_the_state_cannot_go_back() -> None:
    session = fake()
    prompt = [1, 2, 1, 2, 1, 2, 7, 1, 2]
    session.trim = cannot_go_back
    steps = generate(session, prompt, prompt_lookup=3, max_new_tokens=9)
    assert list(steps) == list(generate(fake(), prompt, max_new_tokens=9))
    assert session.rows == [steps.held_ids]


def test_look_up_stops_where_the_text_stops() -> None:
    session = says("ab ab ab ab! ")
    steps = generate(session, "p", max_new_tokens=90, prompt_lookup=8, stop="!")
    assert steps.text() == "ab ab ab ab"
    assert session.position == len(steps.held_ids)


# -- batches ----------------------------------------------------------------------------------

PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9], [50, 60, 70], [9]]


@pytest.mark.parametrize("kind", [FakeSession, OneRowSession])
@pytest.mark.parametrize("chunk", [2, None])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_row_of_a_batch_gets_what_it_would_get_alone(
    kind: type[FakeSession], chunk: int | None, temperature: float
) -> None:
    session: Any = kind()
    options: dict[str, Any] = {"temperature": temperature, "max_new_tokens": 9, "seed": 0}
    options["stop_token_ids"] = list(range(0, VOCABULARY, 6))
    results = generate_batch(session, PROMPTS, prefill_chunk=chunk, **options)
    assert len({len(r.token_ids) for r in results}) > 1
    if temperature == 0:
        for prompt, result in zip(PROMPTS, results, strict=True):
            assert result.token_ids == list(generate(fake(), prompt, **options))
    else:
        assert results[0].token_ids == list(generate(fake(), PROMPTS[0], **options))
        assert results[1].token_ids != results[3].token_ids
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result.prompt_tokens == len(prompt)
        assert result.text is None
        ended = result.token_ids[-1] % 6 == 0
        assert result.finish_reason == ("stop" if ended else "length")


def test_rows_are_run_together_where_the_session_can() -> None:
    session = fake()
    generate_batch(session, PROMPTS, max_new_tokens=4)
    assert session.calls == [[7, 1, 3, 1]] + [[1, 1, 1, 1]] * 3


def test_a_batch_of_texts_gives_texts() -> None:
    session = says("abc")
    first, second = generate_batch(session, ["p", "q"], max_new_tokens=4, stop="ca")
    assert (first.text, second.text) == ("ab", "ab")
    assert first.finish_reason == "stop"
    assert first.seconds > 0


# -- scoring ----------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3, 512])
def test_teacher_forced_logits_are_those_of_each_position(chunk: int) -> None:
    ids = [5, 9, 200, 7, 7, 31]
    logits = teacher_forced_logits(fake(), ids, chunk)
    assert logits.shape == (6, VOCABULARY)
    assert logits.dtype == np.float32
    expected = fake().run({"input_ids": np.array([ids])})["logits"][0]
    assert (logits == expected).all()


# -- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        ([1, VOCABULARY], "the prompt has token ids outside 0..256: 257"),
        ([-1], "the prompt has token ids outside 0..256: -1"),
        ([1] * 12, "the prompt has 12 tokens; the model has 12 positions"),
        ("\ud800", "the prompt is not valid Unicode"),
        (["a", "b"], "the prompt is neither text nor token ids"),
        ([[1, 2], [3, 4]], "2 prompts are given at once"),
        ([[1, 2], [3]], "the prompt is a list of lists"),
        (None, "the prompt is neither text nor token ids"),
        (5, "the prompt is neither text nor token ids"),
        ([1.5], "the prompt is neither text nor token ids"),
    ],
    ids=repr,
)
def test_bad_prompts_are_refused(prompt: Any, message: str) -> None:
    session = fake(max_positions=12)
    with pytest.raises(InputError) as caught:
        generate(session, prompt)
    assert caught.value.message.startswith(message)
    assert caught.value.hint
    with pytest.raises(InputError) as caught:
        generate_batch(session, [[1], prompt])
    assert caught.value.message.startswith(f"prompt 1: {message}")


def test_the_last_position_ends_the_text() -> None:
    steps = generate(fake(max_positions=12), [1] * 10, stop_token_ids=[])
    assert len(list(steps)) == 2
    assert steps.finish_reason == "length"
    assert len(teacher_forced_logits(fake(max_positions=12), [1] * 12)) == 12
    with pytest.raises(InputError, match="13 tokens are given, the model has 12 positions"):
        teacher_forced_logits(fake(max_positions=12), [1] * 13)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 1.5),
        ("prefill_chunk", 0),
        ("prompt_lookup", -1),
        ("seed", -1),
        ("temperature", -1),
        ("top_k", -1),
        ("top_p", 2),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("stop", ""),
        ("stop", [""]),
        ("stop", 7),
        ("as_text", "yes"),
        ("stop_token_ids", "a"),
        ("stop_token_ids", [1.5]),
    ],
)
def test_bad_options_are_refused_by_name(option: str, value: Any) -> None:
    options = {option: value}
    for call in (
        lambda: generate(fake(), [1], **options),
        lambda: generate_batch(fake(), [[1]], **options),
    ):
        with pytest.raises(InputError) as caught:
            call()
        assert caught.value.message == f"{option} is {value!r}"
        assert option in caught.value.hint


def test_a_batch_needs_prompts_and_known_options() -> None:
    with pytest.raises(InputError, match="the batch is empty"):
        generate_batch(fake(), [])
    with pytest.raises(InputError, match="prompts is one text"):
        generate_batch(fake(), "abc")
    with pytest.raises(InputError, match="prompt_lookup is given for a batch"):
        generate_batch(fake(), ["abc"], prompt_lookup=4)
    with pytest.raises(InputError, match="no generation option 'tempreature'") as caught:
        generate_batch(fake(), ["abc"], tempreature=1)
    assert caught.value.hint == "did you mean 'temperature'?"
    with pytest.raises(InputError, match="no generation option 'tempreature'") as caught:
        generate(fake(), "abc", tempreature=1)
    assert caught.value.hint == "did you mean 'temperature'?"


@pytest.mark.parametrize("prompts", [None, 5, {"a": "b"}], ids=repr)
def test_a_batch_is_a_list(prompts: Any) -> None:
    with pytest.raises(InputError, match="prompts is a ") as caught:
        generate_batch(fake(), prompts)
    assert caught.value.hint == "pass a list of prompts"


@pytest.mark.parametrize("held", [5, None, "ab", ["a"], [1.5], [[1], [1, 2]], [[1]]], ids=repr)
def test_held_ids_are_a_list_of_ids(held: Any) -> None:
    with pytest.raises(InputError, match="held is no list of token ids"):
        generate(fake(), [5, 6], held=held)


@pytest.mark.parametrize("ids", [VOCABULARY, [1, VOCABULARY], [-1]], ids=repr)
def test_stop_tokens_are_in_the_vocabulary(ids: Any) -> None:
    with pytest.raises(InputError, match=r"stop_token_ids has .*, the vocabulary is 0..256"):
        generate(fake(), [5, 6], stop_token_ids=ids)
    with pytest.raises(InputError, match=r"prompt 0: stop_token_ids has"):
        generate_batch(fake(), [[5, 6]], stop_token_ids=ids)


def test_a_bundle_that_is_no_language_model_is_refused() -> None:
    session = fake()
    session.bundle.manifest.task = "encoder"
    for call in (generate, generate_batch, teacher_forced_logits):
        with pytest.raises(InputError, match="the bundle's task is 'encoder', not 'causal-lm'"):
            call(session, [[1]])


def test_text_and_stop_strings_need_a_tokenizer() -> None:
    session = fake()
    del session.bundle.files["tokenizer/tokenizer.json"]
    for prompt, stop in (("a", None), ([1], "a")):
        with pytest.raises(InputError, match="the bundle has no tokenizer"):
            generate(session, prompt, stop=stop)
    assert list(generate(session, [1], max_new_tokens=1)) != [END]
