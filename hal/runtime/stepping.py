"""Calls of any length on a build of static shapes: one step after the other.

The last chunk of a text is padded on the right where steps take several tokens. What is written
for padding lies after the positions that count, no query sees it, and the next step overwrites it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hal.errors import InputError
from hal.ir.picks import LOGITS
from hal.runtime.picks import Logits

if TYPE_CHECKING:
    from hal.ir import TensorSpec
    from hal.runtime.session import Session


def in_steps(
    session: Session,
    rows: Sequence[int],
    arrays: Mapping[str, Any],
    counts: Sequence[int],
    logits: Logits,
) -> dict[str, Any]:
    """What :meth:`Session.run` gives, computed a step at a time.

    Args:
        session: of a build with :attr:`Session.step_extents`.
        rows: all rows of its state, in order.
        arrays: the model's inputs; those with the axis of tokens are cut along it.
        counts: tokens of each row that count.
        logits: of all tokens, or of each row's last one that counts.

    Raises:
        InputError: the build runs another number of rows.
    """
    step = session.step_extents
    assert step is not None
    if list(rows) != session.state.rows or len(rows) != step.batch:
        raise InputError(
            f"the build runs {step.batch} sequences together, in their order; {len(rows)} of "
            f"{len(session.state.rows)} are given",
            "compile with another extent of the batch (--dim), or run as many",
        )
    axis = (session.inputs[0].dims or ())[1]
    length = np.shape(arrays[session.inputs[0].name])[1]
    parts: list[dict[str, Any]] = []
    last: list[Any] = [None] * len(rows)
    for start in range(0, length, step.tokens):
        chunk = {
            s.name: _chunk(arrays[s.name], s, axis, start, step.tokens) for s in session.inputs
        }
        new = [min(max(n - start, 0), step.tokens) for n in counts]
        outputs = session.run_once(rows, chunk, step.tokens, new, "all")
        if logits == "last":
            for index, count in enumerate(new):
                if count or last[index] is None:
                    last[index] = outputs[LOGITS][index, max(count - 1, 0)][None]
            outputs[LOGITS] = None
        parts.append(outputs)
    results = {
        s.name: _joined([p[s.name] for p in parts], s, axis, length) for s in session.outputs
    }
    if logits == "last":
        results[LOGITS] = np.stack(last)
    return results


def _chunk(array: Any, spec: TensorSpec, axis: object, start: int, tokens: int) -> Any:
    """The part of an input that a step takes, padded with zeros."""
    if axis not in (spec.dims or ()):
        return array
    at = (spec.dims or ()).index(axis)
    part = np.asarray(array).take(range(start, min(start + tokens, np.shape(array)[at])), axis=at)
    short = tokens - part.shape[at]
    widths = [(0, short if index == at else 0) for index in range(part.ndim)]
    return np.pad(part, widths) if short else part


def _joined(parts: Sequence[Any], spec: TensorSpec, axis: object, length: int) -> Any:
    """Outputs of the steps side by side along the tokens; the last one's if it has none."""
    if parts[-1] is None or axis not in (spec.dims or ()):
        return parts[-1]
    at = (spec.dims or ()).index(axis)
    return np.concatenate(parts, axis=at).take(range(length), axis=at)
