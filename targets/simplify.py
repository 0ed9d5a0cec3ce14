"""What inlined bodies leave: constants to compute, the same twice, parts of no extent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from hal.ir import Graph
from hal.ir.inline import infer_types
from hal.passes.cse import CommonSubexpressions
from hal.passes.fold import Fold
from hal.passes.identity import RemoveIdentities


def simplify(graph: Graph) -> None:
    """Rewrite ``graph`` in place for software that is asked for nodes one by one.

    Preserves all results; what shapes and constants decide is decided, and shapes are known where
    they can be.
    """
    turn_weights(graph)
    for step in (Fold(), RemoveIdentities(), CommonSubexpressions()):
        _infer_again(graph)
        step.run(graph)
    _infer_again(graph)


def _infer_again(graph: Graph) -> None:
    """Infer shapes, those too that were stated before the extents of inputs were known."""
    if all(v.shape is not None and v.shape.is_static() for v in graph.graph.inputs):
        for value in (v for node in graph.graph for v in node.outputs):
            if value.shape is not None and not value.shape.is_static():
                value.shape = None
    for value in graph.graph.initializers.values():
        if value.const_value is not None:  # what was folded may still say that it is dynamic
            value.shape = ir.Shape(value.const_value.shape.numpy())
    infer_types(graph.model)


def turn_weights(graph: Graph) -> None:
    """Transposed weights become weights of the build, so that no step transposes them again."""
    for node in list(graph.graph):
        source, result = node.inputs[0] if node.inputs else None, node.outputs[0]
        if node.op_type != "Transpose" or source is None or result.is_graph_output():
            continue
        tensor = source.const_value
        if tensor is None or not source.is_initializer() or source.is_graph_input():
            continue
        order = node.attributes["perm"].as_ints() if "perm" in node.attributes else None
        weight = ir.Value(name=f"{result.name}.weight", const_value=_transposed(tensor, order))
        weight.shape, weight.type = weight.const_value.shape, ir.TensorType(tensor.dtype)  # type: ignore[union-attr,assignment]
        graph.graph.register_initializer(weight)
        result.replace_all_uses_with(weight)
        graph.graph.remove(node, safe=True)


def _transposed(tensor: ir.TensorProtocol, order: Sequence[int] | None) -> ir.LazyTensor:
    axes = list(order) if order is not None else list(reversed(range(len(tensor.shape))))
    shape = ir.Shape([tensor.shape.numpy()[a] for a in axes])

    def compute() -> ir.TensorProtocol:
        array = np.ascontiguousarray(np.transpose(tensor.numpy(), axes))
        return ir.Tensor(array, dtype=tensor.dtype)

    return ir.LazyTensor(compute, dtype=tensor.dtype, shape=shape)
