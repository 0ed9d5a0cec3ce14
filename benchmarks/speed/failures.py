"""What keeps a contender from running, as one sentence; it becomes the text of its cells."""

from __future__ import annotations

import re
from collections.abc import Sequence

LONGEST = 300


class Unavailable(Exception):  # noqa: N818 - it is a fact to report, not an error of ours
    """A contender cannot be set up, made or run; the text says exactly why."""


def reason(text: str) -> str:
    """The line of a program's messages that says why it failed: usually the last error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return without_folders(_telling(lines))[:LONGEST]


def without_folders(text: str) -> str:
    """The text with paths cut to their last part: where things lie here is nobody's concern."""
    return re.sub(r"(?<![\w./:])/(?:[\w.+-]+/)+(?=[\w.+-])", "", text)


def _telling(lines: Sequence[str]) -> str:
    if not lines:
        return "it ended without a message"
    for line in reversed(lines):
        head = line.split(":", 1)[0]
        if head.endswith(("Error", "ERROR", "Exception", "Failed", "error", "Interrupt")):
            return line
    return lines[-1]
