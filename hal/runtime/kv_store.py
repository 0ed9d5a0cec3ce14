"""The carried positions of a session: pools, which page belongs to which row, and how many.

A build's :class:`~hal.ir.cache_plan.CachePlan` says which pools there are. The store owns their
memory, hands it to each step (which writes new positions in place), and keeps the books:

* *contiguous*: row ``b`` has page ``b``, which grows by half when it is full;
* *paged*: rows take pages of :data:`PAGE` positions from a common pool and share them by count;
  a shared page is copied before it is written.

A group with a window forgets positions that no query can see again: whole pages, or, contiguous,
by moving the last window to the front whenever the page is full (once in at least a window).

A build of static shapes has a :class:`~hal.ir.step.Step`: as many pages as rows, of the capacity's
extent from the start.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from hal.errors import InputError
from hal.ir.cache_plan import PAST, CacheGroup, CachePlan, CachePool
from hal.ir.step import Step
from hal.runtime import kv_codec
from hal.runtime.arrays import aligned

PAGE = 32
"""Positions in a page of the paged layout."""

ROOM = 64
"""Positions that a contiguous page starts with, and multiple of which it grows."""


@dataclasses.dataclass
class _Held:
    """What a row holds in one group: positions ``base`` and up, in these pages."""

    base: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Row:
    """One sequence: tokens seen, and what it holds by group name."""

    tokens: int
    held: dict[str, _Held]


class _Pages:
    """The pools of one group and their pages in use."""

    def __init__(self, group: CacheGroup, pools: Sequence[CachePool], page: int) -> None:
        self.group, self.page = group, page
        self.pools = list(pools)
        self.arrays: dict[str, np.ndarray] = {}
        self.uses: list[int] = []
        self.resize(0, page)

    def resize(self, count: int, page: int, valid: int | None = None) -> None:
        """Make room for ``count`` pages of ``page`` positions; the first ``valid`` are kept."""
        kept = self.page if valid is None else valid
        if page == self.page and self.arrays and count <= len(self.uses):
            self.arrays = {name: array[:count] for name, array in self.arrays.items()}
            del self.uses[count:]
            return
        for name, heads, channels, dtype in self._specs():
            fresh = aligned((count, heads, page, channels), dtype)
            old = self.arrays.get(name)
            if old is not None:
                rows = min(len(old), count)
                fresh[:rows, :, :kept] = old[:rows, :, :kept]
            self.arrays[name] = fresh
        self.uses += [0] * (count - len(self.uses))
        del self.uses[count:]
        self.page = page

    def _specs(self) -> Iterable[tuple[str, int, int, str]]:
        for pool in self.pools:
            yield pool.input, pool.heads, pool.stored_channels, pool.dtype
            if pool.bits:
                yield pool.scale_input, pool.heads, pool.scales, "float16"

    def take(self) -> int:
        """A free page; the pool doubles when there is none."""
        if 0 not in self.uses:
            self.resize(max(8, 2 * len(self.uses)), self.page)
        index = self.uses.index(0)
        self.uses[index] = 1
        return index

    def own(self, index: int) -> int:
        """The page itself if one row has it, else a copy of it."""
        if self.uses[index] == 1:
            return index
        copy = self.take()
        for array in self.arrays.values():
            array[copy] = array[index]
        self.uses[index] -= 1
        return copy


class CacheStore:
    """Pools and rows of one session.

    Args:
        plan: what the build carries.
        page: positions in a page (paged layout).
        step: the extents of a build of static shapes.

    Attributes:
        changed: whether memory was changed by other means than a step since this was last reset.
    """

    def __init__(self, plan: CachePlan, *, page: int = PAGE, step: Step | None = None) -> None:
        self.plan, self.page, self.step = plan, page, step
        self.changed = False
        self.paged = plan.layout == "paged"
        size = page if self.paged else 0
        self._groups = {
            g.name: _Pages(g, [p for p in plan.pools if p.group == g.name], size)
            for g in plan.groups
        }
        if step is not None:
            for pages in self._groups.values():
                pages.resize(step.batch, step.page(pages.group.window))
        self._pools = {p.state: p for p in plan.pools if not p.copy}
        self._copies = {p.state: p for p in plan.pools if p.copy}
        self._rows: dict[int, _Row] = {}
        self._next = 0

    # -- rows -----------------------------------------------------------------------------------

    @property
    def rows(self) -> list[int]:
        """Rows in the order in which a batch has them."""
        return list(self._rows)

    def add(self) -> int:
        """A new, empty row; returns its number.

        Raises:
            InputError: the build has room for no more.
        """
        if self.step is not None and len(self._rows) == self.step.batch:
            raise InputError(
                f"the build carries {self.step.batch} "
                f"{'sequence' if self.step.batch == 1 else 'sequences'} and no more",
                "compile with a larger batch, or forget a sequence first",
            )
        row, self._next = self._next, self._next + 1
        self._rows[row] = _Row(0, {name: _Held() for name in self._groups})
        if not self.paged:
            for name, pages in self._groups.items():
                if len(pages.uses) < len(self._rows):
                    pages.resize(len(self._rows), pages.page)
                self._rows[row].held[name].pages = [len(self._rows) - 1]
        return row

    def remove(self, row: int) -> None:
        """Forget a row and give its pages back; contiguous rows after it move up."""
        at = self.rows.index(row)
        gone = self._rows.pop(row)
        self.changed |= at < len(self._rows)
        for name, pages in self._groups.items():
            if self.paged:
                for index in gone.held[name].pages:
                    pages.uses[index] -= 1
                continue
            for later in self.rows[at:]:
                held = self._rows[later].held[name]
                (index,) = held.pages
                for array in pages.arrays.values():
                    array[index - 1] = array[index]
                held.pages = [index - 1]
            if self.step is None:
                pages.resize(len(self._rows), pages.page)

    def fork(self, row: int) -> int:
        """A new row that begins as ``row``: pages are shared until one of them is written."""
        source = self._rows[row]
        copy = self.add()
        self.changed = True
        mine = self._rows[copy]
        mine.tokens = source.tokens
        for name, pages in self._groups.items():
            held = source.held[name]
            if self.paged:
                mine.held[name] = _Held(held.base, list(held.pages))
                for index in held.pages:
                    pages.uses[index] += 1
            else:
                mine.held[name].base = held.base
                for array in pages.arrays.values():
                    array[mine.held[name].pages[0]] = array[held.pages[0]]
        return copy

    def duplicate(self) -> CacheStore:
        """A store of its own that holds the same."""
        other = CacheStore(self.plan, page=self.page, step=self.step)
        other._rows, other._next = copy.deepcopy(self._rows), self._next
        for name, pages in self._groups.items():
            mine = other._groups[name]
            mine.resize(len(pages.uses), pages.page, 0)
            mine.uses = list(pages.uses)
            for key, array in pages.arrays.items():
                mine.arrays[key][:] = array
        return other

    def trim(self, row: int, tokens: int) -> None:
        """Forget all but the first ``tokens`` of a row.

        Raises:
            InputError: there are fewer, or a window has already forgotten what that needs.
        """
        item = self._rows[row]
        if not 0 <= tokens <= item.tokens:
            raise InputError(
                f"the state holds {item.tokens} tokens, it cannot be trimmed to {tokens}",
                "trim to a length between 0 and the current one",
            )
        for name, pages in self._groups.items():
            window, held = pages.group.window, item.held[name]
            if not self._is_copy(pages) and held.base > max(
                0, tokens - window + 1 if window else 0
            ):
                raise InputError(
                    f"a window of {window} has forgotten what comes before token {held.base}",
                    "reset the session and run the prompt again",
                )
        copies = {s: self.read(s, row) for s in self._copies} if tokens < item.tokens else {}
        for name, pages in self._groups.items():
            held = item.held[name]
            if self._is_copy(pages) and copies:
                self._refill(pages, item, tokens, copies)
                continue
            if self.paged:
                keep = -(-max(tokens - held.base, 0) // pages.page)
                for index in held.pages[keep:]:
                    pages.uses[index] -= 1
                del held.pages[keep:]
            if tokens < held.base:
                held.base = tokens
        item.tokens = tokens

    @staticmethod
    def _is_copy(pages: _Pages) -> bool:
        return all(pool.copy for pool in pages.pools)

    def _refill(
        self, pages: _Pages, item: _Row, tokens: int, states: Mapping[str, tuple[np.ndarray, int]]
    ) -> None:
        """Begin a group anew with the newest of ``tokens`` positions, from what ``states`` has."""
        held = item.held[pages.group.name]
        if self.paged:
            for index in held.pages:
                pages.uses[index] -= 1
            held.pages = []
        wanted = max(0, tokens - pages.group.window + 1) if pages.group.window else 0
        start = max([wanted, *(states[p.state][1] for p in pages.pools)])
        before, item.tokens, held.base = item.tokens, start, start
        self._make_room(pages, item, held, tokens - start)
        item.tokens = before
        for pool in pages.pools:
            array, first = states[pool.state]
            self._fill(pages, held, pool, array[:, start - first : tokens - first])

    def reset(self) -> None:
        """Forget all rows; the memory is kept."""
        self._rows.clear()
        for pages in self._groups.values():
            pages.uses = [0] * len(pages.uses)

    def tokens(self, row: int) -> int:
        """Tokens that a row has seen."""
        return self._rows[row].tokens

    def bytes_in_use(self) -> int:
        """Bytes of the positions that rows hold, each shared page once."""
        total = 0
        for name, pages in self._groups.items():
            each = sum(p.token_bytes for p in pages.pools)
            if self.paged:
                total += sum(1 for n in pages.uses if n) * pages.page * each
            else:
                total += sum(r.tokens - r.held[name].base for r in self._rows.values()) * each
        return total

    def pages_of(self, rows: Iterable[int]) -> int:
        """Pages that these rows hold, over all groups, each shared page once."""
        if not self.paged:
            return 0
        held = [self._rows[row].held for row in rows]
        return sum(len({page for h in held for page in h[name].pages}) for name in self._groups)

    def pages_in_use(self) -> int:
        """Pages that rows hold, over all groups."""
        return sum(sum(1 for n in g.uses if n) for g in self._groups.values()) if self.paged else 0

    # -- steps ----------------------------------------------------------------------------------

    def feeds(self, rows: Sequence[int], new: int) -> dict[str, np.ndarray]:
        """Inputs of a step that gives each of ``rows`` up to ``new`` positions: room is made."""
        items = [self._rows[r] for r in rows]
        feeds: dict[str, np.ndarray] = {PAST: np.array([i.tokens for i in items], np.int64)}
        for name, pages in self._groups.items():
            for item in items:
                self._make_room(pages, item, item.held[name], new)
            held = [i.held[name] for i in items]
            lengths = [i.tokens - h.base for i, h in zip(items, held, strict=True)]
            feeds[pages.group.lengths] = np.array(lengths, np.int64)
            blocks = max(len(h.pages) for h in held)
            table = np.zeros((len(items), blocks), np.int32)
            for row, one in zip(table, held, strict=True):
                row[: len(one.pages)] = one.pages
            feeds[pages.group.table] = table
            feeds.update(pages.arrays)
        return feeds

    def advance(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        """Count the positions that a step has written; pages beyond them go back."""
        for row, count in zip(rows, counts, strict=True):
            item = self._rows[row]
            item.tokens += count
            for name, pages in self._groups.items():
                if self.paged:
                    held = item.held[name]
                    needed = -(-(item.tokens - held.base) // pages.page)
                    for index in held.pages[needed:]:
                        pages.uses[index] -= 1
                    del held.pages[needed:]

    def _make_room(self, pages: _Pages, item: _Row, held: _Held, new: int) -> None:
        length, window = item.tokens - held.base, pages.group.window
        if self.paged:
            while window and held.pages and length - pages.page >= window - 1:
                pages.uses[held.pages.pop(0)] -= 1
                held.base += pages.page
                length -= pages.page
            first = length // pages.page
            if first < len(held.pages):  # a page that is partly filled is about to be written
                held.pages[first] = pages.own(held.pages[first])
            while len(held.pages) * pages.page < length + new:
                held.pages.append(pages.take())
            return
        if length + new > pages.page and window and length > window - 1:
            shift = length - (window - 1)
            self.changed = True
            for array in pages.arrays.values():
                part = array[held.pages[0]]
                part[:, : window - 1] = part[:, shift:length].copy()
            held.base += shift
            length = window - 1
        if length + new > pages.page:
            floor = 2 * window if window else pages.page * 3 // 2
            room = -(-max(length + new, floor, ROOM) // ROOM) * ROOM
            pages.resize(len(pages.uses), room)

    # -- the neutral form -----------------------------------------------------------------------

    def read(self, state: str, row: int) -> tuple[np.ndarray, int]:
        """What a row holds of a state, and the position of the first (windows forget some).

        Float32 ``[heads, positions, channels]``.
        """
        pool, item = self._pools[state], self._rows[row]
        pages, held = self._groups[pool.group], item.held[pool.group]
        window, length = pages.group.window, item.tokens - held.base
        start = max(0, length - (window - 1)) if window else 0
        codes = self._joined(pages, held, pool.input, start, length)
        if not pool.bits:
            return codes, held.base + start
        scales = self._joined(pages, held, pool.scale_input, start, length)
        array = kv_codec.decode(codes, scales, pool.bits)
        if state in self._copies:
            self._overlay(array, held.base + start, self._copies[state], item)
        return array, held.base + start

    def _overlay(self, array: np.ndarray, first: int, copy: CachePool, item: _Row) -> None:
        """Put the newest positions, which were not rounded, over ``array`` from ``first`` on."""
        held, pages = item.held[copy.group], self._groups[copy.group]
        start = max(held.base, first)
        newest = self._joined(pages, held, copy.input, start - held.base, item.tokens - held.base)
        array[:, start - first :] = newest

    def _joined(
        self, pages: _Pages, held: _Held, name: str, start: int, stop: int
    ) -> np.ndarray:  # fmt: skip
        array = pages.arrays[name]
        used = -(-stop // pages.page) if pages.page else 0
        parts = [array[index] for index in held.pages[:used]]
        if not parts:
            return np.zeros((array.shape[1], 0, array.shape[3]), array.dtype)
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        return np.array(whole[:, start:stop])

    def load(self, row: int, tokens: int, states: dict[str, tuple[np.ndarray, int]]) -> None:
        """Fill an empty row from the neutral form: what :meth:`read` gave, by state name."""
        item = self._rows[row]
        for pages in self._groups.values():
            self._refill(pages, item, tokens, states)
        item.tokens = tokens

    def _fill(self, pages: _Pages, held: _Held, pool: CachePool, array: np.ndarray) -> None:
        codes, scales = kv_codec.encode(array, pool.bits, pool.block)
        self.changed = True
        for name, data in ((pool.input, codes), (pool.scale_input, scales)):
            if data is None:
                continue
            for block, index in enumerate(held.pages):
                part = data[:, block * pages.page : (block + 1) * pages.page]
                pages.arrays[name][index][:, : part.shape[1]] = part
