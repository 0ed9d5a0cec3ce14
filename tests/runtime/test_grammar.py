"""Text that has to keep to a schema or a grammar does, and wrong ones are refused."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest

from hal.errors import InputError, MissingExtraError
from hal.runtime.generate import generate, generate_batch
from hal.runtime.grammar import checked_grammar
from tests.runtime.fake_session import FakeSession

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Bern", "Zürich"]},
        "warm": {"type": "boolean"},
        "days": {"type": "array", "items": {"enum": [1, 2, 33]}, "minItems": 2, "maxItems": 3},
    },
    "required": ["city", "warm", "days"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA}}


def fake(**metadata: Any) -> Any:
    return FakeSession(**metadata)


def check(text: str) -> None:
    data = json.loads(text)
    assert set(data) == {"city", "warm", "days"}
    assert data["city"] in ("Bern", "Zürich")
    assert isinstance(data["warm"], bool)
    assert 2 <= len(data["days"]) <= 3
    assert set(data["days"]) <= {1, 2, 33}


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "seed": 1}, {"prompt_lookup": 3}])
def test_text_keeps_to_a_schema_and_ends_with_it(options: dict[str, Any]) -> None:
    steps = generate(fake(), "p", response_format=FORMAT, max_new_tokens=400, **options)
    check(steps.text())
    assert steps.finish_reason == "stop"


def test_a_json_object_is_one() -> None:
    session = FakeSession('{"a": [1, 2]} and more')
    session.prompt = 1
    steps = generate(session, "p", response_format={"type": "json_object"})  # type: ignore[arg-type]
    assert json.loads(steps.text()) == {"a": [1, 2]}


def test_text_keeps_to_a_grammar() -> None:
    steps = generate(fake(), "p", grammar='start: "yes" | "no" /[!?]{2}/', max_new_tokens=20)
    assert re.fullmatch(r"yes|no[!?]{2}", steps.text())
    assert steps.finish_reason == "stop"


def test_each_row_of_a_batch_keeps_to_it_by_itself() -> None:
    rows = generate_batch(fake(), ["p", [1, 2, 3]], response_format=FORMAT, max_new_tokens=400)
    assert rows[0].text is not None
    check(rows[0].text)
    check(bytes(i for i in rows[1].token_ids if i < 256).decode())


def test_text_is_free_with_the_format_text() -> None:
    options: dict[str, Any] = {"max_new_tokens": 6}
    free = list(generate(fake(), [1], response_format={"type": "text"}, **options))
    assert free == list(generate(fake(), [1], **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"response_format": "json"}, "response_format is 'json'"),
        ({"response_format": {"type": "yaml"}}, "response_format is {'type': 'yaml'}"),
        ({"response_format": {"type": "json_schema"}}, "response_format has no schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"a": {1}}}}},
            "the schema is not JSON",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}},
            "the grammar cannot be used: ",
        ),
        ({"grammar": ""}, "grammar is ''"),
        ({"grammar": "start: ("}, "the grammar cannot be used: "),
        ({"grammar": "start: /a/", "response_format": FORMAT}, "response_format and grammar are"),
    ],
)
def test_wrong_schemas_and_grammars_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        generate(fake(), "p", **options)
    assert caught.value.message.startswith(message)
    assert caught.value.hint


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtraError) as caught:
        generate(fake(), "p", response_format=FORMAT)
    assert caught.value.hint == "pip install 'hal-compiler[grammar]'"


def test_a_grammar_needs_a_tokenizer() -> None:
    session = fake()
    del session.bundle.files["tokenizer/tokenizer.json"]
    with pytest.raises(InputError, match="the bundle has no tokenizer"):
        generate(session, [1], response_format=FORMAT)


def test_no_option_is_no_grammar() -> None:
    assert checked_grammar(None, None) is None
