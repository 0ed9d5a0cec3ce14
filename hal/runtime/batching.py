"""The rows of a session that many sequences share: who has which, and what may be used again.

No threads and no queue: :mod:`hal.runtime.engine` calls this from the one thread that owns the
session.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from hal.errors import HalError
from hal.runtime.kv_store import PAGE

if TYPE_CHECKING:
    from hal.runtime.session import Session


@dataclasses.dataclass(eq=False)
class Row:
    """One sequence in the session's state.

    Attributes:
        number: as ``session.state`` counts.
        ids: its prompt, int64 [tokens].
        reused: tokens of the prompt that another row had already.
        pages: pages that it takes at most, shared ones included.
    """

    number: int
    ids: np.ndarray
    reused: int
    pages: int


class RowPool:
    """Rows that run, and finished ones kept for prompts that begin like them.

    How rows run follows from the build:

    * paged, or without growing state: any of them in one step (``together``);
    * some growing state carried by value: one after the other, though all at the same time;
    * contiguous: a row has to be the only one, since some runtimes take no part of such a batch.
      ``largest`` is 1 then, and nothing is kept.

    Args:
        session: nobody else uses it.
        max_batch: most rows that run.
        kept_rows: most finished rows that are kept.
        max_pages: most pages that all rows together may take; None: no limit.
        chunk: most tokens that are run of one row in one step.
    """

    def __init__(
        self, session: Session, max_batch: int, kept_rows: int, max_pages: int | None, chunk: int
    ) -> None:
        self._session, self._state = session, session.state
        self._chunk = chunk
        self._max_pages = max_pages
        store = session.state.store
        fixed = all(s.growth_axis is None for s in session.state.by_value)
        many = store is None or store.paged
        self.together = fixed and many and (store is None or store.plan.ragged)
        self._several = many
        self.largest = max_batch if many else 1
        self._kept_rows = kept_rows if many else 0
        self._running: dict[int, Row] = {}
        # Oldest first: ids that a finished row holds, by its number.
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()

    # -- room -----------------------------------------------------------------------------------

    def pages_for(self, tokens: int) -> int:
        """Pages that a row of so many tokens takes at most; 0 if nothing is paged."""
        store = self._state.store
        if store is None or not store.paged:
            return 0
        total = 0
        for group in store.plan.groups:
            held = min(tokens, group.window + self._chunk + store.page) if group.window else tokens
            total += -(-held // store.page)
        return total

    def ever_fits(self, tokens: int) -> bool:
        """Whether a row of so many tokens could run if it were the only one."""
        return self._max_pages is None or self.pages_for(tokens) <= self._max_pages

    def admit(self, ids: np.ndarray, tokens: int) -> Row | None:
        """A row for a prompt that will hold up to ``tokens``; None while there is no room.

        It begins as the row that has most in common with the prompt, at least a page of it.
        Finished rows make room, the one unused for longest first.
        """
        if len(self._running) >= self.largest:
            return None
        pages = self.pages_for(tokens)
        while not self._has_room(pages):
            if not self._kept:
                return None
            self._forget(next(iter(self._kept)))
        number, reused = self._begin(ids)
        # The page in which the two part is copied, so for a while it is there twice.
        row = Row(number, ids, reused, pages + (1 if pages and reused % self._page else 0))
        self._running[number] = row
        return row

    def _has_room(self, pages: int) -> bool:
        """Whether every running row could grow to its end beside a new one of ``pages``."""
        if self._max_pages is None:
            return True
        reserved = sum(row.pages for row in self._running.values()) + pages
        return reserved + self.kept_pages <= self._max_pages

    # -- running --------------------------------------------------------------------------------

    def held(self, row: Row) -> int:
        """Tokens that a row holds."""
        return self._state.tokens(row.number)

    def run_prompt(self, row: Row, tokens: int) -> np.ndarray | None:
        """Run up to ``tokens`` more of a row's prompt; logits [vocab] if that was its end."""
        start = self.held(row)
        part = row.ids[start : start + min(tokens, self._chunk)]
        logits = self._session.step([row.number], part[None], logits="last")
        return logits[0, 0] if self.held(row) == len(row.ids) else None

    def run_tokens(self, rows: Sequence[Row], tokens: Sequence[int]) -> np.ndarray:
        """Run one token of each row; logits [rows, vocab]."""
        ids = np.array(tokens, np.int64)[:, None]
        numbers = [row.number for row in rows]
        if self.together:
            return self._session.step(numbers, ids)[:, -1]
        parts = [self._session.step([n], ids[at : at + 1])[:, -1] for at, n in enumerate(numbers)]
        return np.concatenate(parts)

    def release(self, row: Row) -> None:
        """Give a row and its pages back."""
        del self._running[row.number]
        self._state.remove(row.number)

    def finish(self, row: Row, ids: Sequence[int]) -> None:
        """A row has come to its end, holding ``ids``: keep it for prompts that begin so."""
        del self._running[row.number]
        held = np.array(ids, np.int64)
        known = [n for n, other in self._kept.items() if _common(other, held) == len(held)]
        if not self._kept_rows or len(held) < self._page or known:
            self._state.remove(row.number)
            for number in known[:1]:
                self._kept.move_to_end(number)
            return
        for number, other in list(self._kept.items()):
            if _common(other, held) == len(other):
                self._forget(number)
        self._kept[row.number] = held
        while len(self._kept) > self._kept_rows:
            self._forget(next(iter(self._kept)))

    # -- prefixes -------------------------------------------------------------------------------

    @property
    def kept_rows(self) -> int:
        """Finished rows that are kept."""
        return len(self._kept)

    @property
    def pages(self) -> int:
        """Pages of running rows, each shared page once."""
        return self._pages(self._running)

    @property
    def kept_pages(self) -> int:
        """Pages that nothing but finished rows holds."""
        return self._pages([*self._running, *self._kept]) - self.pages

    def drop_kept(self) -> None:
        """Forget all finished rows."""
        for number in list(self._kept):
            self._forget(number)

    @property
    def _page(self) -> int:
        store = self._state.store
        return store.page if store is not None and store.paged else PAGE

    def _pages(self, rows: Collection[int]) -> int:
        store = self._state.store
        return store.pages_of(rows) if store is not None else 0

    def _forget(self, number: int) -> None:
        del self._kept[number]
        self._state.remove(number)

    def _begin(self, ids: np.ndarray) -> tuple[int, int]:
        """A new row's number, and how many tokens of ``ids`` it holds from the start."""
        candidates = [(_common(held, ids), number) for number, held in self._kept.items()]
        for number, row in self._running.items():
            candidates.append((_common(row.ids[: self.held(row)], ids), number))
        if not self._several:
            candidates = []
        # One token at least is run, for its logits.
        usable = ((min(common, len(ids) - 1), number) for common, number in candidates)
        for common, number in sorted(usable, reverse=True):
            if common < self._page:
                break
            copy = self._state.fork(number)
            try:
                if self._state.tokens(copy) != common:
                    self._state.trim(copy, common)
            except HalError:  # of fixed size, or a sliding window has moved on
                self._state.remove(copy)
                continue
            if number in self._kept:
                self._kept.move_to_end(number)
            return copy, common
        return self._state.add(), 0


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many ids two sequences have in common from the start."""
    count = min(len(one), len(other))
    differ = np.flatnonzero(one[:count] != other[:count])
    return int(differ[0]) if len(differ) else count
