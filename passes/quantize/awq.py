"""AWQ: input channels that matter are made larger before rounding, and smaller in the input.

``W x = (W s) (x / s)``. The division goes into what makes x: the scale (and bias) of a
normalization, or a product with a constant, where nothing else reads x. Elsewhere s is 1. s is
searched among powers of the channels' size, ``s = |x| ** alpha``, for the least error of the
results of all layers that read x; codes are rounded to nearest with the channels' mean square as
importance. Source: Lin et al., arXiv 2306.00978. (There s may also go into a linear layer before
x; here it does not.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from hal.ir import Graph
from hal.passes._edit import Editor, is_constant, is_op
from hal.passes.quantize.codes import Codes
from hal.passes.quantize.formats import Format
from hal.passes.quantize.rtn import round_to_nearest

_ALPHAS = tuple(step / 10 for step in range(11))
_NORMS = ("RMSNormalization", "LayerNormalization")
_MOST_ROWS = 1024
"""Rows of a weight that the search looks at."""


def weighted_rounding(weight: np.ndarray, form: Format, gram: np.ndarray) -> Codes:
    """Round ``weight`` ``[N, K]`` to nearest, errors weighed by the diagonal of ``gram``."""
    return round_to_nearest(weight, form, np.ascontiguousarray(np.diagonal(gram)))


def search_scales(
    weights: Sequence[np.ndarray], forms: Sequence[Format], gram: np.ndarray
) -> np.ndarray:
    """Scales s, float32 ``[K]``, for layers of one input, by the sum of their ``tr(E H Eᵀ)``."""
    size = np.sqrt(np.maximum(np.diagonal(gram), 1e-12))
    best, chosen = np.inf, np.ones(len(gram), np.float32)
    for alpha in _ALPHAS:
        scale = (size**alpha).astype(np.float32)
        scale /= np.sqrt(scale.max() * scale.min())
        inside = gram / np.outer(scale, scale)
        error = 0.0
        for weight, form in zip(weights, forms, strict=True):
            part = weight[:: max(1, len(weight) // _MOST_ROWS)] * scale
            left = part - weighted_rounding(part, form, inside).dequantized()
            error += float(np.vdot(left @ inside, left)) * len(weight) / len(part)
        if error < best:
            best, chosen = error, scale
    return chosen


def foldable(value: ir.Value, readers: set[ir.Node]) -> ir.Node | None:
    """The node that makes ``value`` and can divide it by channel, if only ``readers`` read it."""
    node = value.producer()
    if node is None or value.is_graph_output() or {use.node for use in value.uses()} != readers:
        return None
    if is_op(node, *_NORMS) and value is node.outputs[0]:
        axis = node.attributes.get_int("axis", -1)
        rank = len(value.shape) if value.shape is not None else 0
        last = axis in (-1, rank - 1)
        return node if last and all(is_constant(v) for v in node.inputs[1:] if v) else None
    if is_op(node, "Mul") and _factor(node) is not None:
        return node
    return None


def _factor(node: ir.Node) -> int | None:
    """Which input of a Mul is a constant with one number for each channel."""
    for index, value in enumerate(node.inputs):
        if is_constant(value) and value is not None and value.shape is not None:
            shape = list(value.shape)
            if shape and shape[-1] != 1 and all(d == 1 for d in shape[:-1]):
                return index
    return None


def fold(graph: Graph, node: ir.Node, scale: np.ndarray) -> None:
    """Divide what ``node`` makes by ``scale`` ``[K]``."""
    if is_op(node, "Mul"):
        index = _factor(node)
        assert index is not None
        indices = [index]
    else:
        indices = [i for i, value in enumerate(node.inputs) if i and value is not None]
    edit = Editor(graph)
    for index in indices:
        value = node.inputs[index]
        assert value is not None
        assert value.const_value is not None
        array = value.const_value.numpy()
        divided = (array.astype(np.float32) / scale).astype(array.dtype)
        node.replace_input_with(index, edit.tensor(ir.tensor(divided), f"{value.name}.divided"))


__all__ = ["fold", "foldable", "search_scales", "weighted_rounding"]
