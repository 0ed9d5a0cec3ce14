"""Chat messages to a prompt, by the template that came with the model.

::

    template = ChatTemplate.from_bundle(bundle.files)
    prompt = template.render([{"role": "user", "content": "Hello"}])

A template is a Jinja program out of the model's files, so it runs in Jinja's sandbox, on plain data
only. What it finds there (options, functions, filters) is what transformers gives it.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hal.bundle.files import BundleFiles
from hal.errors import BundleError, InputError

CONFIG_FILE = "tokenizer/tokenizer_config.json"
SPECIAL_TOKENS_FILE = "tokenizer/special_tokens_map.json"
TEMPLATE_FILES = ("tokenizer/chat_template.jinja", "tokenizer/chat_template.json")
_SPECIAL_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")

Message = Mapping[str, Any]


class ChatTemplate:
    """A model's chat template.

    Args:
        source: the Jinja text; several by name are a ``default`` and, for calls with tools,
            ``tool_use``.
        special_tokens: ``bos_token``, ``eos_token``, … for the template to use.

    Raises:
        BundleError: the template is not valid Jinja.
    """

    def __init__(
        self, source: str | Mapping[str, str], special_tokens: Mapping[str, str] | None = None
    ) -> None:
        self._sources = {"default": source} if isinstance(source, str) else dict(source)
        self._special_tokens = dict(special_tokens or {})
        for text in self._sources.values():
            _compiled(text)

    @classmethod
    def from_bundle(cls, files: BundleFiles) -> ChatTemplate:
        """The template in a bundle's tokenizer folder.

        Raises:
            InputError: there is none.
            BundleError: it is not valid.
        """
        config = _read_json(files, CONFIG_FILE)
        source = _source(files, config)
        if source is None:
            raise InputError(
                "the bundle has no chat template",
                "the model was not made for chat: give it a plain prompt, or compile it from a "
                "directory with a chat_template.jinja",
            )
        return cls(source, _special_tokens({**_read_json(files, SPECIAL_TOKENS_FILE), **config}))

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt for a conversation.

        Args:
            messages: each with ``role`` and usually ``content``, oldest first; fields that are None
                are left out.
            tools: JSON schemas of functions that the model may call, if its template knows them.
            add_generation_prompt: end with the opening of the assistant's answer.
            variables: whatever else the model's template reads.

        Returns:
            The text, special tokens in it: encode it without adding any.

        Raises:
            InputError: no messages, one without a role, or the template refuses them (its own
                words are in the error).
        """
        context = {
            **self._special_tokens,
            "messages": _checked(messages),
            "tools": None if tools is None else _plain(list(tools)),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **{name: _plain(value) for name, value in variables.items()},
        }
        source = self._sources.get("tool_use") if tools else None
        source = source or self._sources.get("default") or next(iter(self._sources.values()))
        try:
            return _compiled(source).render(context)
        except jinja2.TemplateError as error:
            raise InputError(
                f"the model's chat template refuses the messages: {_one_line(error)}",
                "check roles and their order; some models take no system message",
            ) from error
        except Exception as error:  # a template is a program: it can fail like one
            raise InputError(
                f"the model's chat template fails on the messages: {_one_line(error)}",
                "check that the messages have the fields that this model expects",
            ) from error


def is_messages(prompt: object) -> bool:
    """Whether a prompt is meant as a conversation: a list of mappings."""
    return isinstance(prompt, (list, tuple)) and bool(prompt) and isinstance(prompt[0], Mapping)


def _checked(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, (list, tuple)):
        raise InputError(
            f"messages is a {type(messages).__name__}",
            'pass a list such as [{"role": "user", "content": "Hello"}]',
        )
    if not messages:
        raise InputError("there are no messages", "give at least one")
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if not isinstance(role, str):
            raise InputError(
                f"message {index} has no role", 'each is like {"role": "user", "content": "Hello"}'
            )
    return [{str(k): _plain(v) for k, v in m.items() if v is not None} for m in messages]


def _plain(value: Any) -> Any:
    """The same in plain JSON types, so that a template meets no object with methods of its own."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"


def _source(files: BundleFiles, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The template's text: a file of its own comes before the tokenizer's configuration."""
    plain, wrapped = TEMPLATE_FILES
    if plain in files:
        return files.read(plain).decode("utf-8")
    source = config.get("chat_template") or _read_json(files, wrapped).get("chat_template")
    if isinstance(source, list):
        source = {item["name"]: item["template"] for item in source if "template" in item}
    return source or None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for kind in _SPECIAL_TOKENS:
        token = config.get(f"{kind}_token")
        token = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(token, str):
            found[f"{kind}_token"] = token
    return found


def _read_json(files: BundleFiles, name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        data = json.loads(files.read(name))
    except ValueError as error:
        raise BundleError(f"{name} is not valid JSON: {error}", "rebuild the bundle") from error
    return data if isinstance(data, dict) else {}


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    try:
        return _environment().from_string(source)
    except jinja2.TemplateError as error:
        raise BundleError(
            f"the model's chat template is not valid: {_one_line(error)}",
            "correct chat_template in the model's directory and compile again",
        ) from error


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's words for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own interface)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block, as in transformers: what is set inside is not seen outside.
        return jinja2.nodes.CallBlock(self.call_method("_pass_on"), [], [], body).set_lineno(line)

    def _pass_on(self, caller: Callable[[], str]) -> str:
        return caller()


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja's escaping for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
