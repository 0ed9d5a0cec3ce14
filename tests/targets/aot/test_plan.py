"""Memory that is in use at the same time does not overlap, and little of it is wasted."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("tvm")

from hal.targets.aot.plan import ALIGNMENT, Memory, _in_a_row, _shared


def overlap(one: Memory, other: Memory) -> bool:
    in_time = one.first <= other.last and other.first <= one.last
    in_space = one.offset < other.offset + other.bytes and other.offset < one.offset + one.bytes
    return in_time and in_space


@pytest.mark.parametrize("seed", range(20))
def test_no_two_that_live_together_overlap(seed: int) -> None:
    rng = random.Random(seed)
    memory = []
    for _ in range(40):
        first = rng.randrange(50)
        last = first + rng.randrange(10)
        memory.append(Memory(rng.randrange(1, 5000), first=first, last=last))
    end = _shared(memory)
    assert all(m.offset % ALIGNMENT == 0 and m.offset + m.bytes <= end for m in memory)
    pairs = [(a, b) for i, a in enumerate(memory) for b in memory[i + 1 :]]
    assert not any(overlap(a, b) for a, b in pairs)
    assert end < sum(m.bytes for m in memory)


def test_a_chain_needs_two_at_a_time() -> None:
    memory = [Memory(1024, first=i, last=i + 1) for i in range(10)]
    assert _shared(memory) == 2048


def test_weights_lie_one_after_the_other() -> None:
    memory = [Memory(100), Memory(64), Memory(1)]
    assert _in_a_row(memory) == 256
    assert [m.offset for m in memory] == [0, 128, 192]
