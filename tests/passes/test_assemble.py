from __future__ import annotations

import numpy as np
import pytest

from hal.passes import Assemble
from tests.passes.toys import Toy, ops, same


def write(t: Toy, target, start: int, stop: int, piece):
    """``target[..., start:stop] = piece``, as exporters write it."""
    back = [2, 1, 0]
    rows = np.arange(start, stop)[:, None]
    moved = t("Transpose", target, perm=back)
    filled = t("ScatterND", moved, rows, t("Transpose", piece, perm=back), reduction="none")
    return t("Transpose", filled, perm=back)


def pieces(*bounds: tuple[int, int]) -> Toy:
    t = Toy(a=["b", 2, 3], c=["b", 2, 5])
    shape = t("Concat", t("Shape", t.a, start=0, end=2), np.array([8]), axis=0)
    target = t("Expand", np.float32(0), shape)
    for (start, stop), piece in zip(bounds, (t.a, t.c), strict=True):
        target = write(t, target, start, stop, piece)
    t.output(target)
    return t


@pytest.mark.parametrize("bounds", [((0, 3), (3, 8)), ((5, 8), (0, 5))])
def test_slices_that_fill_a_tensor_are_concatenated(bounds):
    assert ops(same(pieces(*bounds).graph(), Assemble(), b=2)) == {"Concat": 1}


def test_a_gap_or_an_overlap_stays():
    result = same(pieces((0, 3), (2, 7)).graph(), Assemble(), b=2)
    assert ops(result, "ScatterND")["ScatterND"] == 2
