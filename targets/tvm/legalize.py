"""Rewrites a graph into ops that have converters: refused ops are replaced by their bodies."""

from __future__ import annotations

from hal.ir import Graph
from hal.ir.inline import infer_types, inline_functions, may_have_body
from hal.targets.simplify import turn_weights
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
    turn_weights(graph)
    return graph
