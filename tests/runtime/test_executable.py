"""Segments hand on values, and leave in an input's memory what is looked for there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hal.runtime.executable import SegmentedExecutable
from hal.targets.backend import Executable


class Appends(Executable):
    """Adds one to a pool: in its memory, or in an array of its own as another process would."""

    def __init__(self, *, remote: bool) -> None:
        self.remote = remote

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        pool = inputs["past"]
        if self.remote:
            pool = pool.copy()
        pool += 1
        return {"present": pool, "y": pool.sum()}

    def close(self) -> None:
        pass


def test_a_pool_is_updated_whether_or_not_the_target_shares_memory() -> None:
    for remote in (False, True):
        part = (Appends(remote=remote), ["past"], ["present", "y"])
        executable = SegmentedExecutable([part], ["y"], {"present": "past"})
        pool = np.zeros((2, 3), np.float32)
        memory = pool
        assert [executable.run({"past": pool})["y"] for _ in range(3)] == [6, 12, 18]
        np.testing.assert_array_equal(memory, 3)


def test_what_is_not_told_to_be_in_place_stays_as_it_was() -> None:
    part = (Appends(remote=True), ["past"], ["present", "y"])
    pool = np.zeros((2, 3), np.float32)
    SegmentedExecutable([part], ["y"]).run({"past": pool})
    np.testing.assert_array_equal(pool, 0)
