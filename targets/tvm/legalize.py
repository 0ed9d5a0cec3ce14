"""Rewrites a graph into ops that have converters: refused ops are replaced by their bodies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from hal.ir import Graph
from hal.ir.inline import infer_types, inline_functions, may_have_body
from hal.targets.tvm.fuse_codes import fuse_codes
from hal.targets.tvm.fuse_convolutions import fuse_convolutions
from hal.targets.tvm.fuse_quantized import fuse_quantized
from hal.targets.tvm.lower import check
from hal.targets.tvm.lowering import Shaping

_MARK = "hal.tvm.inline"
_MAX_ROUNDS = 8


def legalize(graph: Graph, shaping: Shaping) -> Graph:
    """A copy of ``graph`` in which refused nodes that have a body are replaced by it.

    Products with quantized weights and convolutions are fused before that.
    """
    graph = graph.clone()
    infer_types(graph.model)
    if not shaping.plain:
        fuse_quantized(graph, shaping)
        fuse_codes(graph, shaping)
        fuse_convolutions(graph, shaping)
    for _ in range(_MAX_ROUNDS):
        refused = [n for n in check(graph.graph, shaping) if may_have_body(graph.model, n)]
        refused = [n for n in refused if _MARK not in n.metadata_props]
        if not refused:
            break
        for node in refused:
            node.metadata_props[_MARK] = "yes"
        model = inline_functions(graph.model, lambda n: n.metadata_props.get(_MARK) == "yes")
        for node in model.graph.all_nodes():
            if node.metadata_props.get(_MARK) == "yes":
                node.metadata_props[_MARK] = "no body"
        graph = Graph(model, graph.state, graph.metadata)
        infer_types(graph.model)
    _transpose_weights(graph)
    return graph


def _transpose_weights(graph: Graph) -> None:
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
