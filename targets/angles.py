"""Nodes that a chip with narrow floats must leave to others, because positions lose their place.

Rotary embeddings take the sine and cosine of a position times a frequency. Float16 has eleven bits,
so at position 200 the angle is off by up to a sixteenth, and past 2,048 positions are not even
told apart. The values of the sine are no problem: those narrow well.
"""

from __future__ import annotations

import onnx_ir as ir

from hal.descriptor import Descriptor

_PERIODIC = ("Sin", "Cos")
_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE)


def coarse_angles(graph: ir.Graph, descriptor: Descriptor) -> dict[ir.Node, str]:
    """Why each node that makes an angle of a position is not for the chip; none on wide floats."""
    computed = descriptor.behaviour.computed_in("float32")
    if computed == "float32":
        return {}
    reason = f"float32 is {computed} there, too coarse for the angle of a position"
    found: dict[ir.Node, str] = {}
    for node in graph:
        if node.op_type in _PERIODIC and not node.domain:
            found |= dict.fromkeys(_from_positions(node), reason)
    return found


def _from_positions(node: ir.Node) -> list[ir.Node]:
    """The node and the float steps before it, if they begin at whole numbers; else nothing."""
    steps, todo, whole = [node], [node], False
    while todo:
        for value in todo.pop().inputs:
            maker = value.producer() if value is not None else None
            if value is not None and value.dtype not in _FLOATS:
                whole |= value.const_value is None
            elif maker is not None and maker not in steps:
                steps.append(maker)
                todo.append(maker)
    return steps if whole else []
