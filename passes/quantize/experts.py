"""What single experts see: the tokens routed to them, and what they make of those in between.

``hal::MixtureOfExperts(x, expert_index, expert_weight, gate_up, down)`` is one op. Each expert has
its own Gram matrices, of x for ``gate_up`` and of what goes into ``down``, from the tokens that
chose it, weighed by the weight that its result gets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from hal.passes.quantize.calibration import Statistics
from hal.passes.quantize.layers import Layer

_PRIOR = 64
"""Tokens' worth of the Gram matrix of all tokens (``gate_up``), or of none in particular
(``down``), that an expert's own is mixed with."""


@dataclasses.dataclass(frozen=True)
class Routed:
    """All calibration tokens at one mixture of experts.

    Attributes:
        x: float32 ``[T, K]``, the input behind quantized layers.
        x_float: the float model's; x itself where there is no second walk.
        index: ``[T, k]``, the experts chosen.
        weight: float32 ``[T, k]``, their weights.
    """

    x: np.ndarray
    x_float: np.ndarray
    index: np.ndarray
    weight: np.ndarray

    def of(self, expert: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Weights ``[n, 1]`` and rows of ``x`` and ``x_float`` that chose ``expert``."""
        share = np.where(self.index == expert, self.weight, 0).sum(1)
        rows = np.flatnonzero((self.index == expert).any(1))
        return share[rows, None].astype(np.float32), self.x[rows], self.x_float[rows]


def gate_up_statistics(routed: Routed, weight: np.ndarray, expert: int) -> Statistics:
    """What ``expert``'s ``weight`` ``[2 I, K]`` sees."""
    share, rows, rows_float = routed.of(expert)
    prior = routed.x.T @ routed.x / np.float32(max(len(routed.x), 1))
    return _mixed(share, rows, rows_float, weight, prior * _mean_square(share))


def down_statistics(
    routed: Routed,
    weight: np.ndarray,
    expert: int,
    gate_up: np.ndarray,
    quantized: np.ndarray,
    activation: str,
) -> Statistics | None:
    """What ``expert``'s ``weight`` ``[K, I]`` sees behind the ``quantized`` first matrix.

    None if no token chose it.
    """
    share, rows, rows_float = routed.of(expert)
    if not len(rows):
        return None
    hidden = _hidden(rows, quantized, activation)
    hidden_float = _hidden(rows_float, gate_up, activation)
    scale = float(np.einsum("nk,nk->", share * hidden, share * hidden)) / hidden.size
    prior = np.eye(hidden.shape[1], dtype=np.float32) * np.float32(scale)
    return _mixed(share, hidden, hidden_float, weight, prior)


def _mixed(
    share: np.ndarray,
    rows: np.ndarray,
    rows_float: np.ndarray,
    weight: np.ndarray,
    prior: np.ndarray,
) -> Statistics:
    count = len(rows)
    scaled = share * rows
    total = np.float32(count + _PRIOR)
    gram = (scaled.T @ scaled + prior * np.float32(_PRIOR)) / total
    if count < rows.shape[1]:  # too few to tell what the weight should make up for
        return Statistics(gram)
    missing = share * ((rows_float - rows) @ weight.T)
    halves = [missing[i::2].T @ scaled[i::2] for i in (0, 1)]
    return Statistics(gram, None, np.stack(halves) * (2 / total))


def _mean_square(share: np.ndarray) -> np.float32:
    return np.float32(np.mean(share * share)) if share.size else np.float32(1)


def _hidden(rows: np.ndarray, gate_up: np.ndarray, activation: str) -> np.ndarray:
    gate, up = np.split(rows @ gate_up.T, 2, axis=1)
    result: np.ndarray = ACTIVATIONS[activation](gate) * up
    return result


def _silu(x: np.ndarray) -> np.ndarray:
    result: np.ndarray = x / (1 + np.exp(-np.clip(x, -80, 80)))
    return result


def _gelu(x: np.ndarray) -> np.ndarray:
    """The tanh form, close enough for statistics of both."""
    inner = np.float32(0.7978845608) * (x + np.float32(0.044715) * x**3)
    result: np.ndarray = x * np.float32(0.5) * (1 + np.tanh(inner))
    return result


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu,
    "relu": lambda x: np.maximum(x, 0),
}
"""The values of the op's ``activation`` attribute."""


def is_down(layer: Layer) -> bool:
    """Whether the layer is the second matrix of its experts."""
    return layer.uses[0].inputs[4] is layer.weight


def routing(node: ir.Node) -> tuple[str, ...]:
    """Names of x, expert_index and expert_weight."""
    return tuple(v.name or "" for v in node.inputs[:3] if v is not None)
