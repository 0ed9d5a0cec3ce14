"""GPTQ: each column is rounded so as to make up for what the columns before it were rounded by.

The error that counts is that of the layer's results, ``sum |(W - Q) x|**2 = tr(E H Eᵀ)`` with the
Gram matrix ``H = sum x xᵀ``. With ``H = M Mᵀ``, M upper triangular, it is ``|E M|**2``, whose
column j is ``E_j M_jj + sum over i < j of E_i M_ij``; so column j is rounded from
``W_j + sum E_i M_ij / M_jj`` (this form needs no inverse of H; that it equals GPTQ's was shown by
Chee et al., arXiv 2307.13304). Source of the method: Frantar et al., arXiv 2210.17323.

Three things go beyond it:

- the weight that is rounded is not W but the one that, on inputs that earlier rounding has moved,
  comes closest to what the float layer would have made of the inputs as they were (Statistics.shift;
  as in GPTAQ, arXiv 2504.02692, and with the value that the result is added to, arXiv 2505.11695);
- groups are visited by weight, those with the largest inputs first, and scales are searched when
  a group is reached, so no permutation of the columns has to be stored;
- afterwards single codes and scales are moved as long as that lowers ``tr(E H Eᵀ)``
  (coordinate descent), which the greedy pass cannot do for columns that it has left behind.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from hal.passes.quantize.calibration import Statistics
from hal.passes.quantize.codes import Codes
from hal.passes.quantize.formats import Format
from hal.passes.quantize.rtn import round_to_nearest

_CHANNEL_BLOCK = 128
"""Columns worked on together where a scale covers a whole row."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Numbers of the method; the defaults are what measured best.

    Attributes:
        damping: added to the diagonal of H, as a part of its mean.
        correction: damping of the correction of W, likewise; None leaves W as it is.
        sweeps: rounds of coordinate descent.
        reorder: visit groups by weight rather than in their order.
    """

    damping: float = 0.01
    correction: float | None = 0.05
    sweeps: int = 3
    reorder: bool = True
    static: bool = False
    refit: bool = True
    importance: str = "diag"


def gptq(
    weight: np.ndarray, form: Format, statistics: Statistics, options: Options | None = None
) -> Codes:
    """Quantize a matrix ``[N, K]`` float32 for the inputs that ``statistics`` tells of."""
    options = options or Options()
    gram = statistics.gram.astype(np.float64)
    mean = float(np.trace(gram)) / len(gram)
    if mean <= 0 or not np.isfinite(mean):
        return round_to_nearest(weight, form)
    if statistics.shift is not None and options.correction is not None:
        damped = gram + np.eye(len(gram)) * (mean * options.correction)
        weight = weight + np.linalg.solve(damped, statistics.shift.T.astype(np.float64)).T.astype(
            np.float32
        )
    gram[np.diag_indices_from(gram)] += mean * options.damping
    state = _State(np.ascontiguousarray(weight.T), form, gram.astype(np.float32), options)
    state.greedy(gram)
    for _ in range(options.sweeps):
        if not state.sweep():
            break
    return state.finished()


class _State:
    """The matrix transposed ``[K, N]``, with what it has been rounded to so far.

    ``error`` is W - Q. Scales and zero points are ``[G, N]``.
    """

    def __init__(self, weight: np.ndarray, form: Format, gram: np.ndarray, options: Options):
        self.weight, self.form, self.gram, self.options = weight, form, gram, options
        columns, rows = weight.shape
        self.length = form.group or columns
        groups = -(-columns // self.length)
        unsigned = not form.symmetric or form.bits == 3
        self.codes = np.zeros((columns, rows), np.float32)  # less the zero point
        self.scale = np.zeros((groups, rows), np.float32)
        self.zero = np.zeros((groups, rows), np.float32) if unsigned else None
        self.error = np.zeros_like(weight)
        self.low, self.high = (form.lowest, form.highest) if form.symmetric else (0, form.levels)

    def bounds(self, group: int) -> tuple[np.ndarray | int, np.ndarray | int]:
        """Lowest and highest code less the zero point."""
        if self.form.symmetric or self.zero is None:
            return self.low, self.high
        return self.low - self.zero[group], self.high - self.zero[group]

    def blocks(self) -> list[tuple[int, np.ndarray]]:
        """Group and columns of each block of columns, in the order of visits."""
        columns = len(self.weight)
        step = min(self.length, _CHANNEL_BLOCK) if self.form.group == 0 else self.length
        weight = np.diagonal(self.gram)
        if not self.options.reorder:
            return [
                (start // self.length, np.arange(start, min(start + step, columns)))
                for start in range(0, columns, step)
            ]
        if self.form.group == 0:
            order = np.argsort(-weight, kind="stable")
            return [(0, order[start : start + step]) for start in range(0, columns, step)]
        found = []
        for group in range(len(self.scale)):
            inside = np.arange(group * step, min((group + 1) * step, columns))
            found.append((group, inside[np.argsort(-weight[inside], kind="stable")]))
        return sorted(found, key=lambda item: -float(weight[item[1]].mean()))

    def greedy(self, gram: np.ndarray) -> None:
        """Round column by column, with feedback."""
        visits = self.blocks()
        order = np.concatenate([columns for _, columns in visits])
        factor = _upper_factor(gram[np.ix_(order, order)])
        if self.form.group == 0 or self.options.static:
            self.search(None, self.weight, np.diagonal(self.gram))
        errors = np.empty_like(self.weight)  # in the order of visits
        start = 0
        for group, columns in visits:
            end = start + len(columns)
            inner = factor[start:end, start:end]
            pivots = np.diagonal(inner)[:, None]
            feedback = factor[:start, start:end].T @ errors[:start]
            if self.form.group and not self.options.static:
                imp = (
                    np.diagonal(self.gram)[columns]
                    if self.options.importance == "diag"
                    else pivots[:, 0] ** 2
                )
                self.search(group, self.weight[columns] + feedback / pivots, imp)
            self._round_block(group, columns, feedback, inner, errors[start:end])
            start = end
        self.error[order] = errors

    def _round_block(
        self,
        group: int,
        columns: np.ndarray,
        feedback: np.ndarray,
        factor: np.ndarray,
        errors: np.ndarray,
    ) -> None:
        scale = self.scale[group]
        inverse = _inverse(scale)
        low, high = self.bounds(group)
        for place, column in enumerate(columns):
            target = self.weight[column] + feedback[place] / factor[place, place]
            code = np.clip(np.rint(target * inverse), low, high)
            self.codes[column] = code
            errors[place] = self.weight[column] - code * scale
            if place + 1 < len(columns):
                feedback[place + 1 :] += factor[place, place + 1 :, None] * errors[place]

    def search(self, group: int | None, target: np.ndarray, importance: np.ndarray) -> None:
        """Scales and zero points of one group, or of all, for ``target`` ``[columns, N]``."""
        found = round_to_nearest(
            np.ascontiguousarray(target.T), self.form, np.ascontiguousarray(importance)
        )
        part = slice(None) if group is None else slice(group, group + 1)
        self.scale[part] = found.scale.T
        if self.zero is not None and found.zero is not None:
            self.zero[part] = found.zero.T

    def sweep(self) -> bool:
        """One round of coordinate descent over codes and scales; whether it changed much."""
        gradient = self.gram @ self.error
        changed = 0
        step = min(self.length, _CHANNEL_BLOCK)
        for start in range(0, len(self.weight), step):
            part = slice(start, min(start + step, len(self.weight)))
            group = start // self.length
            before = self.error[part].copy()
            changed += self._move_codes(group, part, gradient[part].copy())
            moved = self.error[part] - before
            gradient += self.gram[:, part] @ moved
            if self.form.group and self.options.refit:
                moved = self._move_scale(group, part, gradient[part])
                gradient += self.gram[:, part] @ moved
        return changed > self.codes.size // 2000

    def _move_codes(self, group: int, part: slice, gradient: np.ndarray) -> int:
        """Set each code of a block to the best one given all others; the number that changed."""
        inner = self.gram[part, part]
        scale, (low, high) = self.scale[group], self.bounds(group)
        inverse = _inverse(scale)
        changed = 0
        for place in range(len(inner)):
            column = part.start + place
            old = self.codes[column]
            best = np.rint(old + gradient[place] * inverse / inner[place, place])
            code = np.clip(best, low, high)
            if np.array_equal(code, old):
                continue
            changed += int(np.count_nonzero(code != old))
            moved = (old - code) * scale
            self.codes[column] = code
            self.error[column] += moved
            gradient += inner[:, place, None] * moved
        return changed

    def _move_scale(self, group: int, part: slice, gradient: np.ndarray) -> np.ndarray:
        """Set a group's scales to the best ones for its codes; the change of the error."""
        codes = self.codes[part]
        across = np.einsum("kn,kn->n", codes, self.gram[part, part] @ codes)
        along = np.einsum("kn,kn->n", codes, gradient)
        scale = self.scale[group] + np.where(across > 0, along / np.maximum(across, 1e-30), 0)
        scale = scale.astype(np.float16).astype(np.float32)
        delta = scale - self.scale[group]
        gain = 2 * delta * along - delta * delta * across
        delta = np.where((gain > 0) & np.isfinite(scale), delta, 0)
        self.scale[group] += delta
        moved: np.ndarray = -codes * delta
        self.error[part] += moved
        return moved

    def finished(self) -> Codes:
        """What came of it."""
        codes = self.codes.T
        zero = None
        if self.zero is not None:
            zero = np.ascontiguousarray(self.zero.T.astype(np.uint8))
            spread = np.repeat(self.zero, self.length, axis=0)[: len(self.codes)]
            codes = (self.codes + spread).T
        dtype = np.int8 if zero is None else np.uint8
        return Codes(
            self.form,
            np.ascontiguousarray(codes.astype(dtype)),
            np.ascontiguousarray(self.scale.T.astype(np.float16)),
            zero,
        )


def _upper_factor(gram: np.ndarray) -> np.ndarray:
    """M float32, upper triangular, with ``M Mᵀ = gram`` (float64)."""
    flipped = np.linalg.cholesky(gram[::-1, ::-1])
    return np.ascontiguousarray(flipped[::-1, ::-1].astype(np.float32))


def _inverse(scale: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        inverse = 1 / scale
    inverse[~np.isfinite(inverse)] = 0
    return inverse


__all__ = ["Options", "gptq"]
