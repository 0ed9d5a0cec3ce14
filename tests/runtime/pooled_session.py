"""A session without a model whose state is real: it writes ids into the pools and reads them back.

Its logits depend on everything that the row's pages hold, so a page that is mixed up, shared too
long or given back too early changes what is generated.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Sequence
from typing import Any

import numpy as np

from hal.ir import State
from hal.ir.cache_plan import CacheGroup, CachePlan, CachePool
from hal.runtime.picks import Logits, last_of
from hal.runtime.state import CarriedState
from tests.runtime.fake_session import END, VOCABULARY, Files, byte_tokenizer

STATE = State(
    "0.key", "past.0.key", "present.0.key", "key", ("batch", "head", "past", "channel"), 2
)


class PooledSession:
    """Carries ids in pages.

    Args:
        layout: paged or contiguous.
        metadata: facts of the model in addition to the usual.
    """

    capacity = 0
    step_extents = None

    def __init__(self, layout: str = "paged", **metadata: Any) -> None:
        facts = {"vocab_size": VOCABULARY, "eos_token_ids": [END], **metadata}
        self.bundle: Any = types.SimpleNamespace(
            manifest=types.SimpleNamespace(task="causal-lm", metadata=facts),
            files=Files({"tokenizer/tokenizer.json": byte_tokenizer().encode()}),
        )
        group = CacheGroup("all", 0, "lengths", "table")
        pool = CachePool("0.key", "all", 1, 1, 0, "pool", "pool.out")
        self.plan = CachePlan(layout, 0, True, (group,), (pool,))
        self.states = (STATE,)
        self.state = CarriedState(self.states, {}, self.plan, facts.get("max_positions"))
        self.calls: list[list[int]] = []
        self.poison: int | None = None
        self.gate = threading.Event()
        self.gate.set()

    @property
    def store(self) -> Any:
        return self.state.store

    def step(
        self,
        rows: Sequence[int],
        input_ids: np.ndarray,
        lengths: Sequence[int] | None = None,
        logits: Logits = "all",
    ) -> np.ndarray:
        assert self.gate.wait(30)
        width = input_ids.shape[1]
        counts = [width] * len(rows) if lengths is None else list(lengths)
        self.calls.append([*rows])
        if self.poison is not None and self.poison in input_ids:
            raise RuntimeError("the accelerator is gone")
        self.state.check_counts(rows, counts, width)
        feeds = self.state.feeds(rows, width)
        pool, table, held = feeds["pool"], feeds["table"], feeds["lengths"]
        result = np.full((*input_ids.shape, VOCABULARY), np.nan, np.float32)
        page = pool.shape[2]
        for index in range(len(rows)):
            pages = table[index]
            for at in range(counts[index]):
                position = int(held[index]) + at
                pool[pages[position // page], 0, position % page, 0] = input_ids[index, at]
                seen = np.concatenate([pool[p, 0, :, 0] for p in pages])[: position + 1]
                result[index, at] = _logits(seen)
        self.state.advance(rows, counts, {})
        return last_of(result, counts) if logits == "last" else result


def _logits(ids: np.ndarray) -> np.ndarray:
    seed = int(np.dot(ids, np.arange(1, len(ids) + 1)))
    logits: np.ndarray = np.random.default_rng(seed).normal(0, 1, VOCABULARY).astype(np.float32)
    logits[END] = -9
    return logits
