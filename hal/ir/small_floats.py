"""Weights whose codes are floats of 4 bits, restated in integers, which more kernels know.

Twice a number of E2M1 is an integer from -12 to 12, so ``DequantizeLinear(codes, scale)`` equals
``DequantizeLinear(2 * codes, scale / 2)`` with codes of 8 bits, exactly: scales of E8M0 are powers
of two. The neutral graph keeps what takes fewer bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

RESTATED_KEY = "hal.restated"
"""Node metadata of a restated ``DequantizeLinear``: the bits of its codes in the neutral graph."""


def restate_small_floats(graph: ir.Graph) -> bool:
    """Restate, in place, each constant ``DequantizeLinear`` of E2M1; say whether there was one."""
    made: dict[ir.Value, ir.Value] = {}
    changed = False
    for node in graph:
        if node.op_type == "DequantizeLinear" and node.domain in ("", "ai.onnx"):
            changed |= _restate(graph, node, made)
    for value in made:
        if not value.uses() and not value.is_graph_output() and value.name is not None:
            del graph.initializers[value.name]
    return changed


def _restate(graph: ir.Graph, node: ir.Node, made: dict[ir.Value, ir.Value]) -> bool:
    codes, scale, *zero = node.inputs
    constants = [v for v in (codes, scale) if v is not None and v.const_value is not None]
    if len(constants) < 2 or any(v is not None for v in zero) or not _typed(node):
        return False
    if not all(v.is_initializer() and not v.is_graph_input() for v in constants):
        return False
    if constants[0].dtype is not ir.DataType.FLOAT4E2M1:
        return False
    for index, (value, dtype, step) in enumerate(
        ((constants[0], ir.DataType.INT8, _doubled), (constants[1], ir.DataType.FLOAT, _halved))
    ):
        if value not in made:
            made[value] = _new(graph, value, dtype, step)
        node.replace_input_with(index, made[value])
    node.metadata_props[RESTATED_KEY] = "4"
    return True


def _typed(node: ir.Node) -> bool:
    """Whether the result's dtype does not follow from the scale's."""
    return node.attributes.get_int("output_dtype", 0) == ir.DataType.FLOAT.value


def _doubled(array: np.ndarray) -> np.ndarray:
    return (array.astype(np.float32) * 2).astype(np.int8)


def _halved(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) * np.float32(0.5)


def _new(
    graph: ir.Graph, value: ir.Value, dtype: ir.DataType, step: Callable[[np.ndarray], np.ndarray]
) -> ir.Value:
    tensor = value.const_value
    assert tensor is not None
    shape, name = ir.Shape(tensor.shape.numpy()), f"{value.name}.restated"
    lazy = ir.LazyTensor(
        lambda: ir.Tensor(step(tensor.numpy()), dtype, name=name), dtype, shape, name=name
    )
    new = ir.Value(name=name, type=ir.TensorType(dtype), shape=shape, const_value=lazy)
    graph.register_initializer(new)
    return new
