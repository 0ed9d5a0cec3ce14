"""What a user should know about the weights of a build."""

from __future__ import annotations

import onnx_ir as ir

from hal.targets.reading import WeightReads, bytes_read, decodes

_IN_EACH_CALL = (
    "weights have no kernel that reads their codes: each call expands them to floats, and their"
    " layers compute on floats, which is no faster than not to quantize them"
)


def weights_read(graph: ir.Graph) -> WeightReads:
    """Of a legalized graph: what a call reads, and codes that no kernel reads as they are."""
    count = sum(decodes(node) for node in graph)
    total = bytes_read(graph, lambda node, _: 0.0 if node.op_type == "QuantizedGather" else None)
    return WeightReads(total, {_IN_EACH_CALL: count} if count else {})


__all__ = ["weights_read"]
