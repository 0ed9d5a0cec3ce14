"""What a user should know about the weights of a build."""

from __future__ import annotations

import collections

import onnx_ir as ir

from hal.targets.onnxruntime.quantized import STORED_KEY
from hal.targets.onnxruntime.static import EXPANDED_KEY, runs_on_codes

_WEIGHT = 4096


def notes(model: ir.Model) -> list[str]:
    """Sentences about weights that are not stored, or not read, as the neutral graph has them."""
    wider = collections.Counter(
        node.metadata_props[STORED_KEY] for node in model.graph if STORED_KEY in node.metadata_props
    )
    found = [
        f"{count} weights: {text}, which is what has a kernel" for text, count in wider.items()
    ]
    expanded = [
        node
        for node in model.graph
        if node.op_type == "DequantizeLinear"
        and node.inputs[0] is not None
        and node.inputs[0].const_value is not None
        and node.inputs[0].const_value.size >= _WEIGHT
        and not runs_on_codes(node)
    ]
    loaded = sum(EXPANDED_KEY in node.metadata_props for node in model.graph)
    if loaded:
        found.append(
            f"{loaded} weights of convolutions have no kernel that reads their codes: they are"
            " expanded to floats when the model is loaded, which is as fast as floats, not faster"
        )
    if expanded:
        found.append(
            f"{len(expanded)} weights have no kernel that reads their codes: each call expands them"
            " to floats, which is slower than not to quantize them"
        )
    return found
