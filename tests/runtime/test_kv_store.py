"""The store of carried positions against a list of tokens for each row."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hal import InputError
from hal.ir.cache_plan import PAST, CacheGroup, CachePlan, CachePool
from hal.runtime import kv_codec
from hal.runtime.kv_store import CacheStore
from tests import cache

WINDOW = 6
GROUPS = (
    CacheGroup("all", 0, PAST, "hal.table.all"),
    CacheGroup("6", WINDOW, "hal.lengths.6", "hal.table.6"),
)


def plan(layout: str, bits: int = 0) -> CachePlan:
    block = 2 if bits else 1
    pools = tuple(
        CachePool(f"{g.name}.key", g.name, 2, 4, bits, f"past.{g.name}", f"present.{g.name}", block)
        for g in GROUPS
    )
    return CachePlan(layout, bits, True, GROUPS, pools)


def vector(token: int) -> np.ndarray:
    """What a token leaves in the cache: ``[heads, channels]``, different for each token."""
    return np.add.outer([0.0, 0.5], token * 10 + np.arange(4)).astype(np.float32)


class Model:
    """Rows as lists of tokens, and a store that is written as a build writes it."""

    def __init__(self, layout: str, bits: int = 0) -> None:
        self.store = CacheStore(plan(layout, bits), page=4)
        self.rows: dict[int, list[int]] = {}
        self.next = 1

    def step(self, rows: list[int], counts: list[int]) -> None:
        """New tokens for some rows, padded to the longest."""
        new = max(counts)
        feeds = self.store.feeds(rows, new)
        tokens = np.arange(len(rows) * new).reshape(len(rows), new) + self.next
        self.next += tokens.size
        update = np.stack([np.stack([vector(t) for t in row], axis=1) for row in tokens])
        for group, pool in zip(GROUPS, self.store.plan.pools, strict=True):
            codes, scales = kv_codec.encode(update, pool.bits, pool.block)
            for name, data in ((pool.input, codes), (pool.scale_input, scales)):
                if data is not None:
                    table, lengths = feeds[group.table], feeds[group.lengths]
                    feeds[name][:] = cache.write(feeds[name], data, table, lengths)
        self.store.advance(rows, counts)
        for row, count, made in zip(rows, counts, tokens, strict=True):
            self.rows[row] += [int(t) for t in made[:count]]

    def check(self) -> None:
        """Every row holds what its tokens left: all of it, or the window before the next one."""
        for row, tokens in self.rows.items():
            assert self.store.tokens(row) == len(tokens)
            for group, pool in zip(GROUPS, self.store.plan.pools, strict=True):
                array, start = self.store.read(pool.state, row)
                first = max(0, len(tokens) - (WINDOW - 1)) if group.window else 0
                assert start == first
                expected = [vector(t) for t in tokens[first:]]
                empty = np.zeros((2, 0, 4), np.float32)
                right = np.stack(expected, axis=1) if expected else empty
                np.testing.assert_array_equal(array, right)


@pytest.mark.parametrize("layout", ["contiguous", "paged"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_sequence_of_steps_trims_forks_and_removals_keeps_every_row(
    layout: str, data: st.DataObject
) -> None:
    model = Model(layout)
    for _ in range(data.draw(st.integers(1, 12))):
        rows = list(model.rows)
        choices = ["add"] + (["step", "step", "step", "trim", "fork", "remove"] if rows else [])
        kind = data.draw(st.sampled_from(choices))
        if kind == "add":
            model.rows[model.store.add()] = []
        elif kind == "step":
            some = data.draw(st.lists(st.sampled_from(rows), min_size=1, unique=True))
            counts = [data.draw(st.integers(0, 70 if len(some) == 1 else 9)) for _ in some]
            if max(counts):
                model.step(some, counts)
        elif kind == "fork":
            row = data.draw(st.sampled_from(rows))
            model.rows[model.store.fork(row)] = list(model.rows[row])
        elif kind == "remove":
            row = data.draw(st.sampled_from(rows))
            model.store.remove(row)
            del model.rows[row]
        else:
            row = data.draw(st.sampled_from(rows))
            keep = len(model.rows[row]) - data.draw(st.integers(0, 3))
            with contextlib.suppress(InputError):  # a window may have forgotten too much
                model.store.trim(row, max(keep, 0))
                del model.rows[row][max(keep, 0) :]
        if kind != "trim":
            model.check()
    for row in list(model.rows):
        model.store.remove(row)
    assert model.store.pages_in_use() == 0


def test_forked_rows_share_pages_until_one_is_written() -> None:
    model = Model("paged")
    model.rows[row := model.store.add()] = []
    model.step([row], [10])
    before = model.store.pages_in_use()
    model.rows[other := model.store.fork(row)] = list(model.rows[row])
    assert model.store.pages_in_use() == before
    model.step([other], [1])
    assert model.store.pages_in_use() == before + len(GROUPS)  # the last page of each group
    model.check()


@pytest.mark.parametrize("layout", ["contiguous", "paged"])
def test_a_window_holds_no_more_than_it_needs(layout: str) -> None:
    model = Model(layout)
    model.rows[row := model.store.add()] = []
    for _ in range(40):
        model.step([row], [5])
    model.check()
    feeds = model.store.feeds([row], 1)
    assert feeds["past.6"].shape[0] * feeds["past.6"].shape[2] <= 64  # of 200 tokens
    assert feeds[PAST] == [200]


def test_what_a_window_has_forgotten_cannot_be_trimmed_back_to() -> None:
    model = Model("paged")
    model.rows[row := model.store.add()] = []
    for _ in range(10):
        model.step([row], [5])
    with pytest.raises(InputError, match="window of 6 has forgotten"):
        model.store.trim(row, 3)
    with pytest.raises(InputError, match="cannot be trimmed to 99"):
        model.store.trim(row, 99)


@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize(("source", "goal"), [("contiguous", "paged"), ("paged", "contiguous")])
def test_a_row_moves_between_layouts(source: str, goal: str, bits: int) -> None:
    first, second = Model(source, bits), CacheStore(plan(goal, bits), page=8)
    first.rows[row := first.store.add()] = []
    for count in (17, 1, 9):
        first.step([row], [count])
    states: dict[str, Any] = {
        p.state: first.store.read(p.state, row) for p in first.store.plan.pools
    }
    moved = second.add()
    second.load(moved, 27, states)
    for name, (array, start) in states.items():
        again, at = second.read(name, moved)
        np.testing.assert_allclose(again, array, rtol=1e-6)
        assert at == start


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_within_half_a_step(bits: int) -> None:
    array = np.random.default_rng(0).standard_normal((3, 5, 8), np.float32)
    codes, scales = kv_codec.encode(array, bits, 4)
    assert scales is not None
    assert codes.nbytes == array.size * bits // 8
    error = np.abs(kv_codec.decode(codes, scales, bits) - array).reshape(*scales.shape, 4)
    assert (error <= scales[..., None] * 0.51).all()
