"""``hal run`` and ``hal bench`` on a language model with a tokenizer and a chat template."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

import hal
from tests import models
from tests.cli.conftest import Hal

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
PROMPT = ["--prompt", "The for statement", "--max-new-tokens", 12]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    source = models.save("llama", folder, vocab_size=1536, num_hidden_layers=1)
    models.add_tokenizer(source, TEMPLATE)
    path = folder / "chat.hal"
    hal.compile(source, target="host:onnxruntime", output=path, verify=False)
    return path


def test_a_prompt_is_continued_and_the_rate_told(hal_command: Hal, chat: Path) -> None:
    plain = hal_command("run", chat, *PROMPT)
    assert plain.code == 0, plain.err
    assert "[12 tokens on host:onnxruntime, " in plain.out
    report = hal_command("run", chat, *PROMPT, "--json").json
    assert plain.out.startswith(report["text"])
    assert len(report["token_ids"]) == 12
    assert report["finish_reason"] == "length"
    assert report["stats"]["new_tokens"] == 12


def test_a_text_that_ends_for_want_of_room_says_so(hal_command: Hal, chat: Path) -> None:
    result = hal_command("run", chat, *PROMPT[:3], 100_000)
    positions = hal.load(chat).manifest.metadata["max_positions"]
    assert result.code == 0
    assert result.err == f"note: stopped: all {positions} positions of the model are taken\n"


def test_statistics_tell_rates_and_the_size_of_the_state(hal_command: Hal, chat: Path) -> None:
    out = hal_command("run", chat, *PROMPT, "--stats").out
    for word in ("prefill", "decode", "state", "bytes per token", "finished  length"):
        assert word in out
    stats = hal_command("run", chat, *PROMPT, "--json").json["stats"]
    assert stats["state_bytes_per_token"] == 2 * 2 * 16 * 4  # key and value, 2 heads of 16, float32
    assert stats["state_tokens"] == stats["prompt_tokens"] + 11
    assert stats["state_bytes"] == stats["state_bytes_per_token"] * stats["state_tokens"]


def test_sampling_is_repeatable(hal_command: Hal, chat: Path) -> None:
    options = ["--temperature", 1.5, "--top-k", 500, "--top-p", 0.99, "--min-p", 0.0001]

    def draw(seed: int) -> Any:
        more = ["--repetition-penalty", 1.1, "--seed", seed, "--json"]
        return hal_command("run", chat, *PROMPT, *options, *more).json["token_ids"]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_a_stop_text_ends_it_and_look_up_changes_nothing(hal_command: Hal, chat: Path) -> None:
    whole = hal_command("run", chat, *PROMPT, "--json").json["text"]
    stop = whole[len(whole) // 2 :][:3]
    options = ["--stop", "never", "--stop", stop, "--prompt-lookup", 4, "--json"]
    report = hal_command("run", chat, *PROMPT, *options).json
    assert report["text"] == whole.partition(stop)[0]
    assert report["finish_reason"] == "stop"


def test_a_chat_answers_line_by_line_and_keeps_the_history(
    hal_command: Hal, chat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--chat", "--system", "Be brief.", "--max-new-tokens", 5]
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n\nAnd now?\n"))
    report = hal_command("run", chat, *options, "--json").json
    roles = [m["role"] for m in report["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    first, second = report["turns"]
    assert first["reused_tokens"] == 0
    assert second["reused_tokens"] >= first["prompt_tokens"]
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n\nAnd now?\n"))
    plain = hal_command("run", chat, *options)
    answers = [m["content"] for m in report["messages"] if m["role"] == "assistant"]
    assert plain.out == "".join(answer + "\n" for answer in answers)


def test_a_chat_with_a_prompt_is_one_answer(hal_command: Hal, chat: Path) -> None:
    result = hal_command("run", chat, "--chat", *PROMPT, "--json")
    assert result.json["messages"][0]["content"] == "The for statement"
    assert len(result.json["turns"]) == 1


def test_a_text_is_continued_from_a_saved_state(
    hal_command: Hal, chat: Path, tmp_path: Path
) -> None:
    state, later = tmp_path / "a.state", tmp_path / "b.state"
    whole = hal_command("run", chat, *PROMPT, "--json").json["token_ids"]
    start = ["--prompt", "The for statement", "--max-new-tokens", 5]
    first = hal_command("run", chat, *start, "--save-state", state, "--json").json
    rest = ["--load-state", state, "--max-new-tokens", 7, "--save-state", later]
    second = hal_command("run", chat, *rest, "--json").json
    assert first["token_ids"] + second["token_ids"] == whole
    third = hal_command("run", chat, "--load-state", later, "--prompt", " and", "--json").json
    assert third["stats"]["reused_tokens"] == first["stats"]["prompt_tokens"] + 12
    state.write_bytes(state.read_bytes()[:-1])
    result = hal_command("run", chat, "--load-state", state)
    assert result.code == 2
    assert "is no state file, or it is damaged" in result.err


def test_a_chat_goes_on_from_a_saved_state(
    hal_command: Hal, chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = ["--chat", "--max-new-tokens", 5, "--json"]
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nAnd now?\n"))
    whole = hal_command("run", chat, *short).json
    state = tmp_path / "a.state"
    first = hal_command("run", chat, *short, "--prompt", "Hello", "--save-state", state)
    assert first.code == 0, first.err
    more = ["--prompt", "And now?", "--load-state", state, "--save-state", state]
    second = hal_command("run", chat, *short, *more).json
    assert second["turns"][0]["reused_tokens"] == whole["turns"][0]["prompt_tokens"] + 5
    assert second["messages"][-1] == whole["messages"][-1]
    result = hal_command("run", chat, "--chat", "--load-state", state, "--system", "x")
    assert "--system is given for a conversation that goes on" in result.err
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    result = hal_command("run", chat, "--chat", "--save-state", state)
    assert result.err.startswith("error: no message came")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "x", "-o", "f.npz"], "--output has no effect on generating text"),
        (["--prompt", "x", "--random-inputs"], "--random-inputs has no effect on generating"),
        (["--prompt", "x", "-i", "x=x.npy"], "--input has no effect on generating text"),
        (["--prompt", "x", "--dim", "a=1"], "--dim has no effect on generating text"),
        (["--random-inputs", "--save-state", "x"], "--save-state has no effect on a run"),
        (["--prompt", "x", "--save-state", "none/x"], "--save-state: cannot write none/x"),
        (["--prompt", "x", "--save-state", "."], "--save-state: cannot write .: it is"),
        (["--random-inputs", "-o", "none/x.npz"], "--output: cannot write none/x.npz"),
    ],
)
def test_options_without_effect_and_places_that_cannot_be_written_are_refused_at_once(
    hal_command: Hal, chat: Path, options: list[str], message: str
) -> None:
    result = hal_command("run", chat, *options)
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith(f"error: {message}")


def test_text_keeps_to_a_schema_in_a_file(hal_command: Hal, chat: Path, tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["for", "while"]}')
    result = hal_command("run", chat, *PROMPT, "--json-schema", schema, "--json")
    assert json.loads(result.json["text"]) in ("for", "while")
    schema.write_text("{")
    result = hal_command("run", chat, *PROMPT, "--json-schema", schema)
    assert result.code == 2
    assert result.err.startswith(f"error: --json-schema: cannot read {schema}")


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        (["--prompt", ""], "the prompt is empty", "give at least one token"),
        (["--prompt", "x", "--top-p", 2], "top_p is 2.0", "top_p is a number from 0 to 1"),
        (["--prompt", "x", "--temperature", -1], "temperature is -1.0", "temperature is a number"),
        (["--prompt", "x", "--stop", ""], "stop is ['']", "none of them empty"),
        (["--prompt", "x " * 400], "the prompt has", "shorten the prompt to at most 255"),
        (["--prompt", "x", "--system", "y"], "--system is given without --chat", "add --chat"),
    ],
)
def test_bad_values_are_told_in_two_lines(
    hal_command: Hal, chat: Path, options: list[Any], message: str, hint: str
) -> None:
    result = hal_command("run", chat, *options)
    assert result.code == 2
    assert result.out == ""
    first, second = result.err.splitlines()
    assert message in first
    assert hint in second


def test_a_bundle_without_a_template_or_a_language_model_cannot_chat(
    hal_command: Hal, bundle: Path
) -> None:
    result = hal_command("run", bundle, "--chat", "--prompt", "x")
    assert result.code == 2
    assert "the bundle has no chat template" in result.err
    result = hal_command("run", bundle, "--prompt", "x")
    assert "the bundle's task is" in result.err


# -- bench ------------------------------------------------------------------------------------

QUICK = ["--rounds", 2, "--warmup", 1, "--threads", 1]


def test_bench_measures_every_context_with_every_prompt(hal_command: Hal, chat: Path) -> None:
    lengths = ["--prompt-tokens", "8,4", "--context", "20,0", "--new-tokens", 3]
    report = hal_command("bench", chat, *QUICK, *lengths, "--json").json
    cases = report["targets"][0]["cases"]
    assert [(c["context"], c["prompt_tokens"]) for c in cases] == [(0, 8), (0, 4), (20, 8), (20, 4)]
    for case in cases:
        assert case["runs"] == 6
        assert case["prefill_tokens_per_second"] > 0
        assert case["decode_tokens_per_second"] > 0
        assert case["latency_seconds"]["p50"] <= case["latency_seconds"]["p99"]
    table = hal_command("bench", chat, *QUICK, *lengths)
    assert table.code == 0, table.err
    assert "prefill tokens/s" in table.out
    assert "context" in table.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--context", "a"], "--context 'a' is not a list of whole numbers from 0"),
        (["--prompt-tokens", "0"], "--prompt-tokens '0' is not a list of whole numbers from 1"),
        (["--prompt-tokens", ""], "--prompt-tokens '' is not a list of whole numbers from 1"),
        (["--context", ""], "--context '' is not a list of whole numbers from 0"),
        (["--prompt-tokens", "1,,2"], "--prompt-tokens '1,,2' is not a list"),
        (["--context", "8,250"], "context, prompt and new tokens are 302 together, the model has"),
    ],
)
def test_bench_refuses_bad_lengths(
    hal_command: Hal, chat: Path, options: list[str], message: str
) -> None:
    result = hal_command("bench", chat, *options)
    assert result.code == 2
    assert result.err.startswith(f"error: {message}")


def test_bench_has_no_contexts_for_other_models(hal_command: Hal, bundle: Path) -> None:
    result = hal_command("bench", bundle, "--context", "8")
    assert result.code == 2
    assert "--context is for language models" in result.err
