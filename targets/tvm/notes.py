"""What a user should know about the weights of a build."""

from __future__ import annotations

import onnx_ir as ir

from hal.targets.reading import WeightReads, bytes_read, decodes
from hal.targets.tvm.own_ops import CONVOLUTION, EXPANDED

_IN_EACH_CALL = (
    "weights have no kernel that reads their codes: each call expands them to floats, and their"
    " layers compute on floats, which is no faster than not to quantize them"
)


_IN_THE_BUILD = (
    "weights of convolutions have no kernel that reads their codes: the build has them as floats,"
    " and their layers compute on floats, which is no faster than not to quantize them"
)


def weights_read(graph: ir.Graph) -> WeightReads:
    """Of a legalized graph: what a call reads, and codes that no kernel reads as they are."""
    counts = {
        _IN_EACH_CALL: sum(decodes(node) for node in graph),
        _IN_THE_BUILD: sum(
            node.op_type == CONVOLUTION and node.attributes[EXPANDED].as_int() for node in graph
        ),
    }
    total = bytes_read(graph, _share)
    return WeightReads(total, {text: count for text, count in counts.items() if count})


def _share(node: ir.Node, index: int) -> float | None:
    """Of this backend's own ops: a row of a table is nothing, of experts the chosen ones count."""
    if node.op_type == "QuantizedGather":
        return 0.0
    if node.op_type == "QuantizedMixtureOfExperts" and index >= 3:  # the packed weights
        chosen = node.inputs[1].shape if node.inputs[1] is not None else None
        count = chosen[-1] if chosen is not None else None
        experts = node.attributes["experts"].as_int()
        return min(1.0, count / experts) if isinstance(count, int) else 1.0
    return None


__all__ = ["weights_read"]
