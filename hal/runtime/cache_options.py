"""The small language of ``kv_cache=`` and ``--kv-cache``: what to carry, and how.

>>> parse_kv_cache("latent,int8")
CacheOptions(carry='latent', layout=None, bits=8)
"""

from __future__ import annotations

import dataclasses
from typing import Any

from hal.errors import InputError, did_you_mean

CARRY = ("latent", "expanded", "exported")
LAYOUT = ("contiguous", "paged")
BITS = {"int8": 8, "int4": 4}
VALUES = ("auto", *LAYOUT, *BITS, *CARRY)
"""The words that may be combined with commas."""


@dataclasses.dataclass(frozen=True)
class CacheOptions:
    """``carry`` is for the cache pass, the rest for builds.

    ``carry`` is ``auto``, ``latent`` or ``expanded``; ``exported`` leaves the pass out.

    ``layout`` (``contiguous``, ``paged``) and ``bits`` (8, 4) are None where a target may choose.
    """

    carry: str = "auto"
    layout: str | None = None
    bits: int | None = None


def parse_kv_cache(text: Any) -> CacheOptions:
    """Read words with commas between them; at most one each of what, layout and width.

    Raises:
        InputError: a word is unknown, or two of them exclude each other.
    """
    if not isinstance(text, str):
        raise InputError(f"kv_cache={text!r} is not text", f"use {', '.join(VALUES)}")
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word not in VALUES:
            raise InputError(
                f"kv_cache={text!r}: unknown value {word!r}", did_you_mean(word, VALUES)
            )
    carry = _only(text, words, CARRY)
    layout = _only(text, words, LAYOUT)
    width = _only(text, words, tuple(BITS))
    return CacheOptions(carry or "auto", layout, BITS[width] if width else None)


def _only(text: str, words: list[str], choices: tuple[str, ...]) -> str | None:
    found = [choice for choice in choices if choice in words]
    if len(found) > 1:
        raise InputError(
            f"kv_cache={text!r} asks for both {found[0]!r} and {found[1]!r}", "choose one of them"
        )
    return found[0] if found else None
