"""Dividing a value by channel where it is made, so that weights that read it can be multiplied.

``W x = (W s) (x / s)``. The division goes into what makes x: the scale (and bias) of a
normalization, a product with a constant, or the linear layer before, whose rows it divides; where
something else reads x, or nothing of these makes it, s is 1. The linear layer may be one factor of
a product of two (a gated layer), and may be quantized already: then its scales are divided.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from hal.ir import Graph
from hal.passes._edit import Editor, is_constant, is_op

_NORMS = ("RMSNormalization", "LayerNormalization")


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
    if is_op(node, "Mul"):
        if _factor(node) is not None:
            return node
        return next((m for v in node.inputs if (m := _linear(v, {node})) is not None), None)
    if is_op(node, "SwiGLU"):
        return _linear(node.inputs[1], {node})
    return _linear(value, readers)


def _factor(node: ir.Node) -> int | None:
    """Which input of a Mul is a constant with one number for each channel."""
    for index, value in enumerate(node.inputs):
        if is_constant(value) and value is not None and value.shape is not None:
            shape = list(value.shape)
            if shape and shape[-1] != 1 and all(d == 1 for d in shape[:-1]):
                return index
    return None


def _linear(value: ir.Value | None, readers: set[ir.Node]) -> ir.Node | None:
    """The product that makes ``value``, with weights of its own, if only ``readers`` read it."""
    node = value.producer() if value is not None else None
    if value is None or node is None or not is_op(node, "MatMul"):
        return None
    if value.is_graph_output() or {use.node for use in value.uses()} != readers:
        return None
    return node if _rows(node) is not None else None


def _rows(node: ir.Node) -> tuple[ir.Node, int, int] | None:
    """Where the numbers are that belong to a product's channels: node, input, and their axis."""
    weight = node.inputs[1]
    if weight is None or len(list(weight.uses())) != 1:
        return None
    if is_constant(weight):
        return (node, 1, 1) if weight.shape is not None and len(weight.shape) == 2 else None
    turn = weight.producer()
    if turn is None or not is_op(turn, "Transpose"):
        return None
    source = turn.inputs[0]
    if source is None or len(list(source.uses())) != 1:
        return None
    if is_constant(source):
        return turn, 0, 0
    made = source.producer()
    scale = made.inputs[1] if made is not None and is_op(made, "DequantizeLinear") else None
    if made is None or scale is None or not is_constant(scale):
        return None
    return (made, 1, 0) if scale.dtype is ir.DataType.FLOAT16 else None


def fold(graph: Graph, node: ir.Node, scale: np.ndarray) -> None:
    """Divide what ``node`` makes by ``scale`` ``[K]``."""
    if is_op(node, "MatMul"):
        found = _rows(node)
        assert found is not None
        where, index, axis = found
        _divide(graph, where, index, scale, axis)
    elif is_op(node, "Mul"):
        factor = _factor(node)
        assert factor is not None
        _divide(graph, node, factor, scale)
    else:
        for index, value in enumerate(node.inputs):
            if index and value is not None:
                _divide(graph, node, index, scale)


def _divide(graph: Graph, node: ir.Node, index: int, scale: np.ndarray, axis: int = -1) -> None:
    value = node.inputs[index]
    assert value is not None
    assert value.const_value is not None
    array = value.const_value.numpy()
    extents = [1] * array.ndim
    extents[axis] = -1
    divided = (array.astype(np.float32) / scale.reshape(extents)).astype(array.dtype)
    new = Editor(graph).tensor(ir.tensor(divided), f"{value.name}.divided")
    node.replace_input_with(index, new)


__all__ = ["fold", "foldable"]
