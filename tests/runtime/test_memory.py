"""Memory goes back to the system."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from hal.runtime.memory import give_back, given_back_when_freed


def _private() -> int:
    """Bytes of memory without a file behind it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("RssAnon")) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_refers_to_itself_is_given_back() -> None:
    class Node:
        def __init__(self) -> None:
            self.me = self
            self.data = [np.ones(1 << 13) for _ in range(1000)]  # 64 KiB each: not mapped alone

    give_back()  # what other tests have left free would be taken first
    before = _private()
    node = Node()
    assert _private() > before + (60 << 20)
    del node
    give_back()
    assert _private() < before + (20 << 20)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_large_blocks_go_back_when_they_are_freed() -> None:
    """Even below something that lives, which a heap could not do."""
    with given_back_when_freed():
        before = _private()
        blocks, pins = [], []
        for _ in range(20):
            blocks.append(np.ones(1 << 20))  # 8 MiB
            pins.append(bytes(5000))
        assert _private() > before + (150 << 20)
        blocks.clear()
        assert _private() < before + (20 << 20)
