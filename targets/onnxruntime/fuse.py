"""Ops of ONNX Runtime's own domain that pay: ``QuickGelu``, ``MoE``, kernels of quantized weights.

The runtime fuses most things itself; these rewrites cover what it does not see. It has kernels for
the recurrent ops of ONNX too, under its own domain.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from hal.targets.onnxruntime.moe import CONTRIB, fuse_experts
from hal.targets.onnxruntime.quantized import fuse_quantized
from hal.targets.onnxruntime.static import fuse_static


def fuse(model: ir.Model) -> ir.Model:
    """Rewrite ``model`` in place and return it. Values keep their names."""
    changed = fuse_static(model)
    changed |= fuse_quantized(model)
    changed |= fuse_experts(model)
    for node in list(model.graph.all_nodes()):
        if node.domain == "" and node.op_type in ("Swish", "SwiGLU"):
            changed |= _swish(node)
        elif node.domain == "" and node.op_type in ("LinearAttention", "CausalConvWithState"):
            changed |= _recurrent(node)
        elif node.domain == "" and node.op_type == "Range":
            _scalar_limits(node)
    if changed:
        model.opset_imports.setdefault(CONTRIB, 1)
    return model


def _scalar_limits(node: ir.Node) -> None:
    """Make scalars of limits of shape ``[1]``: the runtime refuses those if it knows the shape."""
    for index, value in enumerate(node.inputs):
        if value is None or value.shape is None or len(value.shape) != 1 or node.graph is None:
            continue
        empty = ir.node("Constant", [], attributes={"value": ir.tensor(np.array([], np.int64))})
        scalar = ir.node("Reshape", [value, empty.outputs[0]])
        for step, suffix in ((empty, "no_dims"), (scalar, "scalar")):
            step.name = f"{node.outputs[0].name}/{index}/{suffix}"
            step.outputs[0].name = step.name
        scalar.outputs[0].type, scalar.outputs[0].shape = value.type, ir.Shape([])
        node.graph.insert_before(node, [empty, scalar])
        node.replace_input_with(index, scalar.outputs[0])


def _recurrent(node: ir.Node) -> bool:
    """The runtime's own op of the same name, inputs, attributes and meaning, for float32."""
    if any(v is not None and v.dtype is not ir.DataType.FLOAT for v in node.inputs):
        return False
    node.domain = CONTRIB
    return True


def _swish(node: ir.Node) -> bool:
    """``x * sigmoid(alpha * x)`` is ``QuickGelu``; ``SwiGLU(a, b)`` is ``QuickGelu(a) * b``."""
    first = node.inputs[0]
    if first is None or first.dtype is not ir.DataType.FLOAT or node.graph is None:
        return False
    alpha = ir.AttrFloat32("alpha", node.attributes.get_float("alpha", 1.0))
    result = node.outputs[0]
    gate = ir.Node(CONTRIB, "QuickGelu", [first], [alpha], name=f"{result.name}/QuickGelu")
    gate.outputs[0].type, gate.outputs[0].shape = first.type, first.shape
    if node.op_type == "Swish":
        new, last = [gate], gate
    else:
        gate.outputs[0].name = f"{result.name}/gate"
        last = ir.Node("", "Mul", [gate.outputs[0], node.inputs[1]], name=f"{result.name}/Mul")
        new = [gate, last]
    ir.convenience.replace_nodes_and_values(
        node.graph, node, [node], new, [result], [last.outputs[0]]
    )
    return True
