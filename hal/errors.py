"""Every error that hal raises on purpose.

::

    HalError                    exit code 2: the input or the request is wrong
    ├── ModelError              the model file, directory or module cannot be read
    │   └── ExportError         a module cannot be brought to the IR
    ├── GraphError              a graph breaks the rules of the IR
    ├── TargetError             unknown target, bad descriptor
    │   └── DescriptorError     a descriptor file is wrong (names file and field)
    ├── UnsupportedError        an op that no kernel, body or fallback covers
    ├── BundleError             damaged, foreign or newer bundle
    ├── InputError              wrong name, dtype, rank or shape at run time
    ├── MissingExtraError       an optional dependency is not installed
    └── CheckFailed             exit code 1: a verification did not hold

The text of an error is one sentence that names the thing and the place; ``hint`` says what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar


class HalError(Exception):
    """Base of all errors raised on purpose; printed as ``error: …`` and ``hint: …``."""

    exit_code: ClassVar[int] = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ModelError(HalError):
    """A model file, directory or module cannot be read."""


class ExportError(ModelError):
    """A module was found but cannot be expressed in the IR."""


class GraphError(HalError):
    """A graph breaks the rules of the IR (see :func:`hal.ir.verify`)."""


class TargetError(HalError):
    """A target is unknown or cannot be used on this machine."""


class DescriptorError(TargetError):
    """A target descriptor is malformed; the text names the file and the field."""


class UnsupportedError(HalError):
    """Nodes that no kernel, function body or fallback covers; the text lists them."""


class BuildError(UnsupportedError):
    """A backend claimed nodes, and then could not compile them."""


class BundleError(HalError):
    """A bundle is damaged, was made by a newer version, or is not a bundle."""


class InputError(HalError):
    """An argument at run time has a wrong name, dtype, rank or shape."""


class MissingExtraError(HalError):
    """An optional dependency is needed and not installed."""

    def __init__(self, purpose: str, extra: str) -> None:
        super().__init__(
            f"{purpose} needs the optional dependency group {extra!r}",
            f"pip install 'hal-compiler[{extra}]'",
        )


class CheckFailed(HalError):  # noqa: N818  (reads as the sentence it is)
    """A verification, budget or conformance check did not hold."""

    exit_code: ClassVar[int] = 1
    figures: Mapping[str, Any] | None = None
    """What was measured, where a verification failed (see :mod:`hal.runtime.verification`)."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``did you mean 'x'?`` for the closest known name, or a list of the known ones."""
    choices = sorted(known)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known: " + ", ".join(choices) if choices else "none are known"
