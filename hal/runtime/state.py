"""What a session carries from call to call, row by row of a batch.

Growing state lies in pools (:mod:`hal.runtime.kv_store`) where the build has them; the rest goes in
and out of each call by value: state of fixed size, and caches that the lowering did not understand.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hal.errors import BundleError, InputError
from hal.ir import State, TensorSpec
from hal.ir.cache_plan import CachePlan
from hal.ir.step import Step
from hal.runtime.kv_store import CacheStore


class CarriedState:
    """Rows, each a sequence with its own length, and what is carried for them.

    Args:
        states: all states of the model.
        specs: dtype and dims of each state by input name.
        plan: which of them lie in pools, None for none.
        limit: most positions of a row, None for no limit.
        step: the extents of a build of static shapes.
    """

    def __init__(
        self,
        states: Sequence[State],
        specs: Mapping[str, TensorSpec],
        plan: CachePlan | None,
        limit: int | None,
        step: Step | None = None,
    ) -> None:
        self.store = CacheStore(plan, step=step) if plan else None
        self._capacity = step.capacity if step else 0
        pooled = {p.state for p in plan.pools} if plan else set()
        self.by_value = tuple(s for s in states if s.name not in pooled)
        self._specs = specs
        self._limit = limit
        self._tokens: dict[int, int] = {}
        self._next = 0
        # By-value arrays of the rows that ran together last; taken apart when others run.
        self._together: tuple[int, ...] = ()
        self._arrays: dict[str, Any] = {}
        self._apart: dict[int, dict[str, np.ndarray]] = {}

    # -- rows -----------------------------------------------------------------------------------

    @property
    def rows(self) -> list[int]:
        """All rows, oldest first."""
        return list(self._tokens)

    def add(self) -> int:
        """A new row that holds nothing."""
        row = self.store.add() if self.store else self._next
        self._next = row + 1
        self._tokens[row] = 0
        return row

    def remove(self, row: int) -> None:
        """Forget a row; its pages go back."""
        self._split()
        if self.store is not None:
            self.store.remove(row)
        del self._tokens[row]
        self._apart.pop(row, None)

    def clear(self) -> None:
        """Forget all rows."""
        for row in reversed(self.rows):
            self.remove(row)

    def fork(self, row: int) -> int:
        """A new row that begins as ``row``; pages are shared until one of the two writes them."""
        self._split()
        made = self.store.fork(row) if self.store else self._next
        self._next = made + 1
        self._tokens[made] = self._tokens[row]
        if row in self._apart:
            self._apart[made] = dict(self._apart[row])
        return made

    def duplicate(self) -> CarriedState:
        """A copy that goes on by itself."""
        self._split()
        other = copy.copy(self)
        other.store = self.store.duplicate() if self.store else None
        other._tokens = dict(self._tokens)
        other._apart = {row: dict(arrays) for row, arrays in self._apart.items()}
        return other

    def tokens(self, row: int) -> int:
        """Tokens that a row has seen."""
        return self._tokens[row]

    def trim(self, row: int, length: int) -> None:
        """Forget all but the first ``length`` tokens of a row.

        Raises:
            InputError: it holds fewer; some state is of fixed size, which cannot be taken back; or
                a sliding window has forgotten what that needs.
        """
        if any(s.growth_axis is None for s in self.by_value):
            raise InputError(
                "state of fixed size cannot be trimmed", "reset the session and run a prefix again"
            )
        if not 0 <= length <= self._tokens[row]:
            raise InputError(
                f"the state holds {self._tokens[row]} tokens, it cannot be trimmed to {length}",
                "trim to a length between 0 and the current one",
            )
        if self.store is not None:
            self.store.trim(row, length)
        self._split()
        for item in self.by_value:
            if row in self._apart:
                array = self._apart[row][item.name]
                self._apart[row][item.name] = array.take(range(length), axis=item.growth_axis)
        self._tokens[row] = length

    # -- steps ----------------------------------------------------------------------------------

    def check_counts(self, rows: Sequence[int], counts: Sequence[int], length: int) -> None:
        """Refuse a step that has no room, or whose padding would enter the state.

        Raises:
            InputError: a row would exceed the limit, or rows differ where they must not.
        """
        longest = max((self._tokens[r] + n for r, n in zip(rows, counts, strict=True)), default=0)
        if self._limit is not None and longest > self._limit:
            raise InputError(
                f"{longest} positions are asked for, the model has {self._limit}",
                "shorten the prompt, or reset the session",
            )
        if self._capacity and longest > self._capacity:
            raise InputError(
                f"{longest} positions are asked for, the build has room for {self._capacity}",
                "shorten the prompt, reset the session, or compile with more room (--dim)",
            )
        unequal = len({*counts, length}) > 1
        if unequal and (self.by_value or self.store is None or not self.store.plan.ragged):
            raise InputError(
                "rows of different lengths cannot be run together: padding would enter the state",
                "run the rows one by one",
            )

    def feeds(self, rows: Sequence[int], new: int) -> dict[str, Any]:
        """State inputs of a step that gives each of ``rows`` up to ``new`` positions.

        Raises:
            InputError: rows cannot run together.
        """
        if self.store is not None and not self.store.plan.ragged:
            self._require_equal(rows)
        feeds: dict[str, Any] = self.store.feeds(rows, new) if self.store else {}
        if self.by_value:
            self._join(rows)
            feeds.update((s.input, self._arrays[s.name]) for s in self.by_value)
        return feeds

    def take_changed(self) -> bool:
        """Whether pools were changed by other means than a step since this was last asked."""
        if self.store is None or not self.store.changed:
            return False
        self.store.changed = False
        return True

    def advance(
        self, rows: Sequence[int], counts: Sequence[int], outputs: Mapping[str, Any]
    ) -> None:
        """Take over what a step has written for ``rows``, ``counts`` tokens of each."""
        if self.store is not None:
            self.store.advance(rows, counts)
        for item in self.by_value:
            self._arrays[item.name] = outputs[item.output]
        for row, count in zip(rows, counts, strict=True):
            self._tokens[row] += count

    # -- the neutral form -----------------------------------------------------------------------

    def read(self, state: State, row: int) -> tuple[np.ndarray, int]:
        """A state of a row without its batch axis, and its first position (0 but for windows)."""
        if self.store is not None and state not in self.by_value:
            return self.store.read(state.name, row)
        self._split()
        if row not in self._apart:
            return self._empty(state).squeeze(_batch_axis(state)), 0
        return self._apart[row][state.name].squeeze(_batch_axis(state)), 0

    def load(self, row: int, tokens: int, states: Mapping[str, tuple[np.ndarray, int]]) -> None:
        """Fill an empty row from what :meth:`read` gave, by state name."""
        if self.store is not None:
            self.store.load(row, tokens, dict(states))
        self._split()
        self._apart[row] = {
            s.name: np.expand_dims(states[s.name][0], _batch_axis(s)) for s in self.by_value
        }
        self._tokens[row] = tokens

    @property
    def bytes(self) -> int:
        """Bytes that hold something now."""
        arrays = [*self._arrays.values(), *(a for r in self._apart.values() for a in r.values())]
        by_value = sum(np.asarray(a).nbytes for a in arrays)
        return by_value + (self.store.bytes_in_use() if self.store else 0)

    def _empty(self, state: State) -> np.ndarray:
        return empty_state(state, self._specs[state.input], 1)

    def _join(self, rows: Sequence[int]) -> None:
        """Make the by-value arrays those of ``rows``."""
        if self._together == tuple(rows):
            return
        self._split()
        self._require_equal(rows)
        for item in self.by_value:
            parts = [
                self._apart[r][item.name] if r in self._apart else self._empty(item) for r in rows
            ]
            whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=_batch_axis(item))
            self._arrays[item.name] = whole
        self._together = tuple(rows)
        for row in rows:
            self._apart.pop(row, None)

    def _split(self) -> None:
        """Take the joined arrays apart by row."""
        for index, row in enumerate(self._together):
            self._apart[row] = {
                s.name: np.take(np.asarray(self._arrays[s.name]), [index], axis=_batch_axis(s))
                for s in self.by_value
            }
        self._together, self._arrays = (), {}

    def _require_equal(self, rows: Sequence[int]) -> None:
        grows = self.store is not None or any(s.growth_axis is not None for s in self.by_value)
        lengths = [self._tokens[r] for r in rows]
        if grows and len(set(lengths)) > 1 and not (self.store and self.store.plan.ragged):
            raise InputError(
                f"rows that hold {lengths} tokens cannot be run together in this build",
                "run the rows one by one",
            )


def _batch_axis(state: State) -> int:
    return state.axes.index("batch") if "batch" in state.axes else 0


def empty_state(state: State, spec: TensorSpec, batch: int) -> np.ndarray:
    """What a state holds before the first call: nothing along the growth axis, zeros otherwise.

    Raises:
        BundleError: an axis other than batch and growth is dynamic.
    """
    dims: list[int] = []
    for axis, dim in enumerate(spec.dims or ()):
        if axis == state.growth_axis:
            dims.append(0)
        elif isinstance(dim, int):
            dims.append(dim)
        elif state.axes[axis] == "batch":
            dims.append(batch)
        else:
            raise BundleError(
                f"state {state.name!r} has a dynamic axis {axis} ({dim})",
                "only batch and growth may be",
            )
    return np.zeros(dims, np.dtype(spec.dtype))
