"""What a user should know about the weights of a build."""

from __future__ import annotations

import onnx_ir as ir

_WEIGHT = 4096


def notes(graph: ir.Graph) -> list[str]:
    """Sentences about codes in a legalized graph that no kernel reads as they are."""
    decoded = [
        node
        for node in graph
        if node.op_type == "DequantizeLinear"
        and node.inputs[0] is not None
        and node.inputs[0].const_value is not None
        and node.inputs[0].const_value.size >= _WEIGHT
    ]
    if not decoded:
        return []
    return [
        f"{len(decoded)} weights have no kernel that reads their codes: each call expands them to"
        " floats, and their layers compute on floats, which is no faster than not to quantize them"
    ]


__all__ = ["notes"]
