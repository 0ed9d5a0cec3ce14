"""GPTQ: each column is rounded so as to make up for what the columns before it were rounded by.

The error that counts is that of the layer's results, ``sum |(W - Q) x|**2 = tr(E H Eᵀ)`` with the
Gram matrix ``H = sum x xᵀ``. With ``H = M Mᵀ``, M upper triangular, it is ``|E M|**2``, whose
column j is ``E_j M_jj + sum over i < j of E_i M_ij``; so column j is rounded from
``W_j + sum E_i M_ij / M_jj`` (this form needs no inverse of H; that it equals GPTQ's was shown by
Chee et al., arXiv 2307.13304). Source of the method: Frantar et al., arXiv 2210.17323.

Three things go beyond it:

- the weight that is rounded is not W but the one that, on inputs that earlier rounding has moved,
  comes closest to what the float layer would have made of the inputs as they were (Statistics;
  as in GPTAQ, arXiv 2504.02692, and with the value that the result is added to, arXiv 2505.11695),
  as far as what one half of the tokens tells of it holds for the other half (_Correction);
- scales are searched when a group is reached, for the weights as they have become by then;
- afterwards single codes and scales are moved as long as that lowers ``tr(E H Eᵀ)``
  (coordinate descent), which the greedy pass cannot do for columns that it has left behind.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from hal.passes.quantize.calibration import Statistics
from hal.passes.quantize.codes import Codes, joined
from hal.passes.quantize.factor import lower_factor, solve
from hal.passes.quantize.formats import Format
from hal.passes.quantize.grid import code_dtype, round_scale, round_to_grid
from hal.passes.quantize.rtn import round_to_nearest

_CHANNEL_BLOCK = 128
"""Columns worked on together where a scale covers a whole row."""

_PUSH = 256
"""Columns after which the gradient of all others is brought up to date."""

_AT_ONCE = 4 << 20
"""Weights worked on together; five float32 arrays of as many elements are held for them."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Numbers of the method; the defaults are what measured best.

    Attributes:
        damping: added to the diagonal of H, as a part of its mean.
        correction: damping of the correction of W, likewise; None leaves W as it is.
        sweeps: rounds of coordinate descent.
        reorder: visit groups by the size of their inputs, largest first, instead of in their order.
    """

    damping: float = 0.01
    correction: float | None = 0.5
    sweeps: int = 2
    reorder: bool = False


def gptq(
    weight: np.ndarray, form: Format, statistics: Statistics, options: Options | None = None
) -> Codes:
    """Quantize a matrix ``[N, K]`` float32 for the inputs that ``statistics`` tells of."""
    options = options or Options()
    mean = float(np.trace(statistics.gram, dtype=np.float64)) / len(statistics.gram)
    if mean <= 0 or not np.isfinite(mean):
        return round_to_nearest(weight, form)
    correction = _Correction.of(statistics, options, mean)
    gram = statistics.gram.copy()
    gram[np.diag_indices_from(gram)] += np.float32(mean * options.damping)
    plan = _Plan.of(gram, form, options)

    def work(part: slice) -> Codes:
        target = weight[part]
        if correction is not None:
            target = target + correction.change(target, part)
        return _solve(np.ascontiguousarray(target.T), form, plan, options)

    return joined([work(part) for part in _parts(*weight.shape)])


def _parts(rows: int, columns: int) -> list[slice]:
    """Rows that are worked on together: none depends on another."""
    count = -(-rows * columns // _AT_ONCE)
    step = -(-rows // count)
    return [slice(start, start + step) for start in range(0, rows, step)]


@dataclasses.dataclass(frozen=True)
class _Correction:
    """D ``[N, K]`` for which W + D is what should be rounded: ``S (H + damping)^-1``.

    S = W cross + lacking is what results lack, times the inputs. Where they lack more than the
    layer's inputs can tell of (a model in which small changes grow, as one of random weights does),
    a fit to a few tokens is noise, which the next layers would be asked to make up for in turn, and
    so on without end. With D' from one half of the tokens and S'' from the other, ``<D', S''>`` is
    the part that is none, on the mean; ``<D, S> / tr(D H Dᵀ)`` of D has the least error.

    Attributes:
        statistics: of the layer.
        cross, lacking: of both halves, times the inverse.
    """

    statistics: Statistics
    cross: np.ndarray | None
    lacking: np.ndarray | None

    @classmethod
    def of(cls, statistics: Statistics, options: Options, mean: float) -> _Correction | None:
        if options.correction is None or (statistics.cross is None and statistics.lacking is None):
            return None
        damped = statistics.gram.copy()
        damped[np.diag_indices_from(damped)] += np.float32(mean * options.correction)
        factor = lower_factor(damped)

        def solved(halves: np.ndarray | None) -> np.ndarray | None:
            if halves is None:
                return None
            rows = halves.reshape(-1, halves.shape[-1])
            return solve(factor, rows.T).T.reshape(halves.shape)

        return cls(statistics, solved(statistics.cross), solved(statistics.lacking))

    def change(self, weight: np.ndarray, part: slice) -> np.ndarray:
        """D for some rows of the matrix, ``weight``."""
        first, second = (_of_half(i, weight, part, self.cross, self.lacking) for i in (0, 1))
        other = _of_half(1, weight, part, self.statistics.cross, self.statistics.lacking)
        holds = np.vdot(first, other)
        whole = (first + second) / 2
        size = np.vdot(whole @ self.statistics.gram, whole)
        result: np.ndarray = whole * np.float32(np.clip(holds / size, 0, 1) if size > 0 else 0)
        return result


def _of_half(
    half: int, weight: np.ndarray, part: slice, cross: np.ndarray | None, lacking: np.ndarray | None
) -> np.ndarray:
    """``W cross + lacking`` of one half of the tokens, for some rows."""
    found = np.float32(0) if cross is None else weight @ cross[half]
    return np.asarray(found if lacking is None else found + lacking[half][part])


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What does not depend on the rows: H, the order of visits, M in that order."""

    gram: np.ndarray
    visits: list[tuple[int, np.ndarray]]
    order: np.ndarray
    factor: np.ndarray

    @classmethod
    def of(cls, gram: np.ndarray, form: Format, options: Options) -> _Plan:
        visits = _visits(np.diagonal(gram), form, options)
        order = np.concatenate([columns for _, columns in visits])
        factor = _upper_factor(gram[np.ix_(order, order)] if options.reorder else gram)
        return cls(gram, visits, order, factor)


def _visits(weight: np.ndarray, form: Format, options: Options) -> list[tuple[int, np.ndarray]]:
    """Group and columns of each block of columns, in the order of visits."""
    columns = len(weight)
    if form.group == 0:
        order = np.argsort(-weight, kind="stable") if options.reorder else np.arange(columns)
        step = _CHANNEL_BLOCK
        return [(0, order[start : start + step]) for start in range(0, columns, step)]
    found = []
    for group, start in enumerate(range(0, columns, form.group)):
        inside = np.arange(start, min(start + form.group, columns))
        if options.reorder:
            inside = inside[np.argsort(-weight[inside], kind="stable")]
        found.append((group, inside))
    if not options.reorder:
        return found
    return sorted(found, key=lambda item: -float(weight[item[1]].mean()))


def _solve(weight: np.ndarray, form: Format, plan: _Plan, options: Options) -> Codes:
    state = _State(weight, form, plan, options)
    state.greedy()
    for _ in range(options.sweeps):
        if not state.sweep():
            break
    return state.finished()


class _State:
    """The matrix transposed ``[K, N]``, with what it has been rounded to so far.

    ``error`` is W - Q. Scales and zero points are ``[G, N]``.
    """

    def __init__(self, weight: np.ndarray, form: Format, plan: _Plan, options: Options) -> None:
        self.weight, self.form, self.plan, self.options = weight, form, plan, options
        self.gram = plan.gram
        columns, rows = weight.shape
        self.length = form.group or columns
        groups = -(-columns // self.length)
        unsigned = not form.symmetric
        self.codes = np.zeros((columns, rows), np.float32)  # less the zero point
        self.scale = np.zeros((groups, rows), np.float32)
        self.zero = np.zeros((groups, rows), np.float32) if unsigned else None
        self.error = np.zeros_like(weight)
        self.gradient: np.ndarray | None = None
        self.low, self.high = (form.lowest, form.highest) if form.symmetric else (0, form.levels)

    def bounds(self, group: int) -> tuple[np.ndarray | int, np.ndarray | int]:
        """Lowest and highest code less the zero point."""
        if self.form.symmetric or self.zero is None:
            return self.low, self.high
        return self.low - self.zero[group], self.high - self.zero[group]

    def greedy(self) -> None:
        """Round column by column, with feedback."""
        diagonal = np.diagonal(self.gram)
        if self.form.group == 0:
            self.search(None, self.weight, diagonal)
        errors = np.empty_like(self.weight)  # in the order of visits
        start = 0
        for group, columns in self.plan.visits:
            end = start + len(columns)
            inner = self.plan.factor[start:end, start:end]
            feedback = self.plan.factor[:start, start:end].T @ errors[:start]
            if self.form.group:
                target = self.weight[columns] + feedback / np.diagonal(inner)[:, None]
                self.search(group, target, diagonal[columns])
            self._round_block(group, columns, feedback, inner, errors[start:end])
            start = end
        self.error[self.plan.order] = errors

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
            code = np.clip(round_to_grid(target * inverse, self.form), low, high)
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
        if self.gradient is None:
            self.gradient = self.gram @ self.error
        changed, columns = 0, len(self.weight)
        step = min(self.length, _CHANNEL_BLOCK)
        wide = step * max(1, _PUSH // step)
        for begin in range(0, columns, wide):
            whole = slice(begin, min(begin + wide, columns))
            before = self.error[whole].copy()
            near = self.gradient[whole].copy()
            for start in range(begin, whole.stop, step):
                part = slice(start, min(start + step, columns))
                changed += self._sweep_block(part, near, begin)
            self.gradient += self.gram[:, whole] @ (self.error[whole] - before)
        return changed > self.codes.size // 1000

    def _sweep_block(self, part: slice, near: np.ndarray, begin: int) -> int:
        """Codes and scales of one block; ``near`` is the gradient from column ``begin`` on."""
        before = self.error[part].copy()
        group, own = part.start // self.length, near[part.start - begin : part.stop - begin].copy()
        changed = self._move_codes(group, part, own)
        if self.form.group:
            self._move_scale(group, part, own)
        near += self.gram[begin : begin + len(near), part] @ (self.error[part] - before)
        return changed

    def _move_codes(self, group: int, part: slice, gradient: np.ndarray) -> int:
        """Set each code of a block to the best one given all others; the number that changed."""
        inner = self.gram[part, part]
        scale, (low, high) = self.scale[group], self.bounds(group)
        inverse = _inverse(scale)
        changed = 0
        for place in range(len(inner)):
            column = part.start + place
            old = self.codes[column]
            best = round_to_grid(old + gradient[place] * inverse / inner[place, place], self.form)
            code = np.clip(best, low, high)
            if np.array_equal(code, old):
                continue
            changed += int(np.count_nonzero(code != old))
            moved = (old - code) * scale
            self.codes[column] = code
            self.error[column] += moved
            gradient += inner[:, place, None] * moved
        return changed

    def _move_scale(self, group: int, part: slice, gradient: np.ndarray) -> None:
        """Set a group's scales to the best ones for its codes."""
        codes = self.codes[part]
        across = np.einsum("kn,kn->n", codes, self.gram[part, part] @ codes)
        along = np.einsum("kn,kn->n", codes, gradient)
        scale = self.scale[group] + np.where(across > 0, along / np.maximum(across, 1e-30), 0)
        with np.errstate(over="ignore"):
            scale = round_scale(scale, self.form).astype(np.float32)
        delta = scale - self.scale[group]
        gain = 2 * delta * along - delta * delta * across
        delta = np.where((gain > 0) & np.isfinite(scale), delta, 0)
        self.scale[group] += delta
        self.error[part] -= codes * delta

    def finished(self) -> Codes:
        """What came of it."""
        codes = self.codes.T
        zero = None
        if self.zero is not None:
            zero = np.ascontiguousarray(self.zero.T.astype(np.uint8))
            spread = np.repeat(self.zero, self.length, axis=0)[: len(self.codes)]
            codes = (self.codes + spread).T
        return Codes(
            self.form,
            np.ascontiguousarray(codes.astype(code_dtype(self.form))),
            np.ascontiguousarray(self.scale.T.astype(np.float16)),
            zero,
        )


def _upper_factor(gram: np.ndarray) -> np.ndarray:
    """M float32, upper triangular, with ``M Mᵀ = gram``.

    In float32 where that will do: descent mends what the factor is wrong by.
    """
    flipped = gram[::-1, ::-1]
    try:
        factor = lower_factor(flipped)
    except np.linalg.LinAlgError:
        factor = lower_factor(flipped.astype(np.float64)).astype(np.float32)
    return np.ascontiguousarray(factor[::-1, ::-1])


def _inverse(scale: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        inverse = 1 / scale
    inverse[~np.isfinite(inverse)] = 0
    return inverse


__all__ = ["Options", "gptq"]
