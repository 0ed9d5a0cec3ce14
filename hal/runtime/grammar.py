"""Text that has to keep to a JSON schema or a grammar, by the library ``llguidance``.

The library needs to know the bundle's tokenizer; then it says for each step which tokens may come
next. It is in the extra ``[grammar]``.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from hal.errors import InputError, MissingExtraError
from hal.runtime.tokenizer import Tokenizer

_WHITESPACE = r"[ \n\t]{0,32}"
"""Between parts of JSON. Without a bound, a model may go on with spaces for ever."""

_FORMATS = "text, json_object, json_schema"


class Grammar:
    """Says which tokens may come next; see :class:`hal.runtime.decoding.Constraint`.

    Args:
        text: as :func:`checked_grammar` returns it.
        tokenizer: the bundle's.
        ends: ids that end the text; they may come where the grammar may end.
        size: of the vocabulary; None: as the tokenizer says.

    Raises:
        InputError: the schema or grammar is wrong, or asks for what is not supported.
        MissingExtraError: the library is not installed.
    """

    def __init__(
        self, text: str, tokenizer: Tokenizer, ends: Iterable[int], size: int | None
    ) -> None:
        try:
            import llguidance
        except ImportError:
            raise MissingExtraError("text that keeps to a grammar", "grammar") from None
        known = _known_tokens(tokenizer, tuple(sorted(ends)), size)
        self._matcher = llguidance.LLMatcher(known, text, log_level=0)
        self._check("the grammar cannot be used", "correct the schema or grammar")

    @property
    def finished(self) -> bool:
        """Whether nothing may follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self, size: int) -> np.ndarray:
        """Which tokens may come next: bool [size].

        Raises:
            InputError: the grammar is too complex to follow.
        """
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check("the grammar cannot be followed", "make it simpler")
        mask = np.unpackbits(packed, bitorder="little")[:size].astype(bool)
        return np.pad(mask, (0, size - len(mask)))

    def accept(self, token: int) -> None:
        """Go on by a token.

        Raises:
            InputError: the grammar has no place for it.
        """
        self._matcher.consume_token(token)
        self._check("the grammar cannot be followed", "make it simpler")

    def _check(self, what: str, hint: str) -> None:
        if self._matcher.is_error():
            raise InputError(f"{what}: {' '.join(self._matcher.get_error().split())}", hint)


def checked_grammar(response_format: object, grammar: object) -> str | None:
    """The options ``response_format`` and ``grammar`` as one grammar; None: none.

    Returns:
        What :class:`Grammar` takes: an outer JSON object around a schema or a Lark grammar.

    Raises:
        InputError: both are given, or one of them is not what it should be.
    """
    if grammar is not None:
        if response_format is not None:
            raise InputError("response_format and grammar are both given", "give one of them")
        if not isinstance(grammar, str) or not grammar.strip():
            raise InputError(f"grammar is {grammar!r}", "grammar is a text in Lark's syntax")
        return json.dumps({"grammars": [{"lark_grammar": grammar}]})
    if response_format is None:
        return None
    hint = f"response_format is a dictionary with a type, one of {_FORMATS}"
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind == "text":
        return None
    if kind not in ("json_object", "json_schema"):
        raise InputError(f"response_format is {response_format!r}", hint)
    schema: Any = {"type": "object"}
    if kind == "json_schema":
        inner = response_format.get("json_schema")  # type: ignore[attr-defined]
        schema = inner.get("schema") if isinstance(inner, Mapping) else None
        if not isinstance(schema, Mapping):
            raise InputError(
                "response_format has no schema",
                'give {"type": "json_schema", "json_schema": {"schema": {…}}}',
            )
    schema = {"x-guidance": {"whitespace_pattern": _WHITESPACE}, **schema}
    try:
        return json.dumps({"grammars": [{"json_schema": schema}]})
    except (TypeError, ValueError) as error:
        raise InputError(f"the schema is not JSON: {error}", "use plain JSON types") from None


_KNOWN: weakref.WeakKeyDictionary[Tokenizer, dict[Any, Any]] = weakref.WeakKeyDictionary()
"""What the library made of each tokenizer: it takes a second for a large vocabulary."""


def _known_tokens(tokenizer: Tokenizer, ends: tuple[int, ...], size: int | None) -> Any:
    import llguidance

    made = _KNOWN.setdefault(tokenizer, {})
    if (ends, size) not in made:
        made[ends, size] = llguidance.LLTokenizer(
            tokenizer.to_json(), n_vocab=size, eos_token=list(ends) or None
        )
    return made[ends, size]
