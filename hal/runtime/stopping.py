"""Stop strings in text that arrives piece by piece."""

from __future__ import annotations

from collections.abc import Iterable

from hal.errors import InputError


class StopStrings:
    """Passes text on until a stop string is complete.

    Text that could be the beginning of a stop string is held back. Where the pieces are cut makes
    no difference: the stop string that is complete first ends the text (of several that end at the
    same place, the longest), and nothing of it or after it is passed on.

    Args:
        stops: the stop strings; none at all passes everything on at once.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """Add text; return what is certain to come before a stop string (often empty)."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [(at + len(s), at) for s in self._stops if (at := text.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text that was held back, when no more is to come."""
        rest, self._held = self._held, ""
        return rest


def checked_stops(stop: object) -> tuple[str, ...]:
    """The option ``stop`` as a tuple of strings; None is none.

    Raises:
        InputError: it is neither a string nor several, or one of them is empty.
    """
    given = (stop,) if isinstance(stop, str) else stop
    if given is None:
        return ()
    if not isinstance(given, (list, tuple)) or not all(isinstance(s, str) and s for s in given):
        raise InputError(
            f"stop is {stop!r}", "stop is a string or a list of strings, none of them empty"
        )
    return tuple(given)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a true beginning of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
