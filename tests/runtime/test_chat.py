"""Chat templates render as they do in transformers, and fail with a sentence."""

from __future__ import annotations

import json
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, models

from hal.errors import BundleError, InputError
from hal.runtime.chat import CONFIG_FILE, SPECIAL_TOKENS_FILE, TEMPLATE_FILES, ChatTemplate
from hal.runtime.generate import generate, generate_batch
from tests.runtime.fake_session import FakeSession, Files
from tests.runtime.templates import TEMPLATES

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "Hello <b>&amp; 'you'</b>\n"}],
    "system": [
        {"role": "system", "content": "Be brief. "},
        {"role": "user", "content": "  Hi"},
        {"role": "assistant", "content": "Ho ho", "reasoning": None},
        {"role": "user", "content": "Ü😀?"},
    ],
    "thought": [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "<think>easy</think>4"},
        {"role": "user", "content": "3+3?"},
    ],
    "call": [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "type": "function",
                    "function": {"name": "weather", "arguments": {"city": "Zürich", "day": 1}},
                }
            ],
        },
        {"role": "tool", "content": '{"sun": true}'},
    ],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "What's the weather <here>?",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def by_transformers(template: str, messages: list[dict[str, Any]], **options: Any) -> str:
    """The prompt, or what transformers says is wrong."""
    inner = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **SPECIAL)
    options = {"add_generation_prompt": True, **options}
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, **options
            )
        )
    except Exception as error:  # noqa: BLE001  (whatever the template raises)
        return f"error: {error}"


def by_us(template: str, messages: list[dict[str, Any]], **options: Any) -> str:
    try:
        return ChatTemplate(template, SPECIAL).render(messages, **options)
    except InputError as error:
        return f"error: {error.message.partition(': ')[2]}"


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "options", [{}, {"add_generation_prompt": False}, {"tools": TOOLS}], ids=["", "no", "tools"]
)
def test_renders_what_transformers_renders(
    name: str, conversation: str, options: dict[str, Any]
) -> None:
    messages = CONVERSATIONS[conversation]
    expected = by_transformers(TEMPLATES[name], messages, **options)
    assert by_us(TEMPLATES[name], messages, **options) == expected
    if conversation == "one":
        assert "Hello <b>&amp; 'you'</b>" in expected


def test_most_of_the_comparisons_are_of_text_and_not_of_errors() -> None:
    texts = [by_transformers(t, m) for t in TEMPLATES.values() for m in CONVERSATIONS.values()]
    assert sum(t.startswith("error: ") for t in texts) < len(texts) / 3
    assert len(set(texts)) > len(texts) * 2 / 3


def test_variables_of_a_template_can_be_set() -> None:
    template = "{{ messages[0].content }}{% if enable_thinking is false %}<no>{% endif %}"
    messages = [{"role": "user", "content": "x"}]
    assert ChatTemplate(template).render(messages) == "x"
    assert ChatTemplate(template).render(messages, enable_thinking=False) == "x<no>"


def test_a_template_of_its_own_is_used_with_tools() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "tools"})
    messages = [{"role": "user", "content": "x"}]
    assert template.render(messages) == "plain"
    assert template.render(messages, tools=TOOLS) == "tools"


# -- from a bundle ----------------------------------------------------------------------------


def bundle(**members: Any) -> Any:
    return Files(
        {
            name: (data if isinstance(data, str) else json.dumps(data)).encode()
            for name, data in members.items()
        }
    )


USER = [{"role": "user", "content": "x"}]
SHOW = "{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}"


@pytest.mark.parametrize(
    "members",
    [
        {
            CONFIG_FILE: {
                "chat_template": SHOW,
                "bos_token": "<s>",
                "eos_token": {"content": "</s>"},
            }
        },
        {CONFIG_FILE: {"chat_template": [{"name": "default", "template": SHOW}], **SPECIAL}},
        {CONFIG_FILE: SPECIAL, TEMPLATE_FILES[0]: SHOW},
        {CONFIG_FILE: {**SPECIAL, "chat_template": "old"}, TEMPLATE_FILES[0]: SHOW},
        {CONFIG_FILE: SPECIAL, TEMPLATE_FILES[1]: {"chat_template": SHOW}},
        {SPECIAL_TOKENS_FILE: SPECIAL, TEMPLATE_FILES[0]: SHOW},
    ],
)
def test_the_template_is_found_wherever_models_keep_it(members: dict[str, Any]) -> None:
    assert ChatTemplate.from_bundle(bundle(**members)).render(USER) == "<s>x</s>"


@pytest.mark.parametrize("members", [{}, {CONFIG_FILE: SPECIAL}, {CONFIG_FILE: [1]}])
def test_a_bundle_without_a_template_says_so(members: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        ChatTemplate.from_bundle(bundle(**members))
    assert caught.value.message == "the bundle has no chat template"
    assert "chat_template.jinja" in caught.value.hint


def test_broken_templates_and_files_say_what_is_wrong() -> None:
    with pytest.raises(BundleError, match=r"not valid: .*endfor"):
        ChatTemplate("{% for m in messages %}")
    with pytest.raises(BundleError, match=r"tokenizer_config\.json is not valid JSON"):
        ChatTemplate.from_bundle(bundle(**{CONFIG_FILE: "{"}))


# -- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "there are no messages"),
        ("hello", "messages is a str"),
        ({"role": "user"}, "messages is a dict"),
        ([{"content": "x"}], "message 0 has no role"),
        ([{"role": "user"}, "x"], "message 1 has no role"),
        ([{"role": 5}], "message 0 has no role"),
    ],
)
def test_messages_that_are_none_are_refused(messages: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        ChatTemplate("x").render(messages)
    assert caught.value.message == message
    assert caught.value.hint


def test_what_a_template_objects_to_is_told() -> None:
    template = ChatTemplate("{{ raise_exception('Only user\n roles!') }}")
    with pytest.raises(InputError, match="refuses the messages: Only user roles!"):
        template.render(USER)
    with pytest.raises(InputError, match="fails on the messages: "):
        ChatTemplate("{{ messages[0].content + 1 }}").render(USER)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['__builtins__'] }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{% for i in range(999999999) %}{% endfor %}",
        "{{ thing.write_text('x') }}",
    ],
)
def test_a_template_cannot_reach_out_of_the_sandbox(attack: str, tmp_path: Any) -> None:
    with pytest.raises(InputError):
        ChatTemplate(attack).render(USER, thing=tmp_path / "f")
    assert not (tmp_path / "f").exists()


# -- generation -------------------------------------------------------------------------------


def chatting(template: str) -> Any:
    return FakeSession("hello ", {TEMPLATE_FILES[0]: template.encode()})


def test_messages_are_a_prompt_and_are_answered_with_text() -> None:
    template = "<|end|>{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    session = chatting(template)
    steps = generate(session, USER, max_new_tokens=3)
    assert len(steps.text()) == 3
    assert steps.prompt_ids == [256, *b"u:x;"]  # the special token once, as the template says
    results = generate_batch(session, [USER, "plain", [1, 2]], max_new_tokens=2)
    assert [r.prompt_tokens for r in results] == [5, 5, 2]
    assert [r.text is None for r in results] == [False, False, True]


def test_messages_need_a_template() -> None:
    session: Any = FakeSession()
    with pytest.raises(InputError, match="the bundle has no chat template"):
        generate(session, USER)
