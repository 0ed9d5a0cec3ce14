"""Which positions' logits a step gives: all, or each row's last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from hal.errors import InputError, did_you_mean

Logits = Literal["all", "last"]
"""Logits of every position, or of each row's last one."""


def check_logits(logits: str) -> None:
    """Refuse what is no :data:`Logits`.

    Raises:
        InputError: it is neither of them.
    """
    if logits not in get_args(Logits):
        raise InputError(f"logits={logits!r} is unknown", did_you_mean(logits, get_args(Logits)))


def picked(counts: Sequence[int], length: int, logits: Logits) -> np.ndarray:
    """Positions to compute logits for: int64 [rows, length], or [rows, 1].

    Args:
        counts: tokens of each row that count; of a row without any, position 0 is taken.
        length: the padded length.
        logits: which.
    """
    if logits == "all":
        return np.tile(np.arange(length, dtype=np.int64), (len(counts), 1))
    return np.array([[max(n - 1, 0)] for n in counts], np.int64)


def last_of(array: Any, counts: Sequence[int]) -> np.ndarray:
    """Logits [rows, 1, vocab] of each row's last position, from those of all.

    Raises:
        InputError: there are none of each position.
    """
    logits = np.asarray(array)
    if logits.ndim != 3 or len(logits) != len(counts):
        raise InputError(
            f"the model's logits of shape {list(logits.shape)} have no positions",
            "leave out logits='last'",
        )
    return np.stack([logits[at, max(n - 1, 0)][None] for at, n in enumerate(counts)])
