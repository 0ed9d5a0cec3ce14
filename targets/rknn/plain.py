"""From the neutral graph to ONNX as the toolkit reads it: an older operator set, spelled out.

The toolkit has no rules of its own for what ONNX lets a model leave away: attributes at their
defaults and zero points of zero are written down, and constants are initializers.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir import tape
from onnx_ir.passes import common

from hal.errors import UnsupportedError
from hal.ir import Graph
from hal.ir.inline import infer_types
from hal.targets.onnxruntime.kernels import kernel_table
from hal.targets.onnxruntime.legalize import legalize
from hal.targets.simplify import simplify

CODED = ("QuantizeLinear", "DequantizeLinear")


def plain(graph: Graph, opset: int) -> Graph:
    """A copy of ``graph`` in operator set ``opset``; inputs, outputs and state keep their names.

    Raises:
        UnsupportedError: a node cannot be said in it.
    """
    graph = graph.clone()
    for node in list(graph.graph):
        if node.op_type == "Gelu" and not node.domain:
            _write_out_gelu(node)
    legal = legalize(graph, kernel_table().until(opset))
    _require_sayable(legal.model, opset)
    _fold(legal.model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(legal.model)
    common.IdentityEliminationPass()(legal.model)
    common.RemoveUnusedNodesPass()(legal.model)
    simplify(legal)
    for node in legal.graph:
        _spell_out(node, opset)
    infer_types(legal.model)
    return legal


def _write_out_gelu(node: ir.Node) -> None:
    """Write ½ x (1 + erf(x / √2)) in the order that the toolkit knows; ONNX's body has another."""
    x, result, graph = node.inputs[0], node.outputs[0], node.graph
    approximated = node.attributes.get_string("approximate", "none") != "none"
    if x is None or x.dtype != ir.DataType.FLOAT or approximated or not isinstance(graph, ir.Graph):
        return
    steps = tape.Tape()
    name = f"{node.name or result.name}/gelu"
    root, one, half = (
        steps.initializer(ir.tensor(np.float32(number), name=f"{name}/{index}"))
        for index, number in enumerate((2**0.5, 1.0, 0.5))
    )
    share = steps.op("Add", [steps.op("Erf", [steps.op("Div", [x, root])]), one])
    last = steps.op("Mul", [x, steps.op("Mul", [half, share])])
    for value in steps.initializers:
        graph.register_initializer(value)
    for index, step in enumerate(steps.nodes):
        step.name = f"{name}/{step.op_type}_{index}"
        step.outputs[0].name = step.name
        step.outputs[0].type, step.outputs[0].shape = result.type, result.shape
    ir.convenience.replace_nodes_and_values(graph, node, [node], steps.nodes, [result], [last])


def _require_sayable(model: ir.Model, opset: int) -> None:
    for node in model.graph.all_nodes():
        if node.domain:
            continue
        try:
            schema = onnx.defs.get_schema(node.op_type, opset)
        except onnx.defs.SchemaError:
            reason = f"{node.op_type} does not exist"
        else:
            added = [name for name in node.attributes if name not in schema.attributes]
            if not added:
                continue
            reason = f"{node.op_type} has no attribute {added[0]}"
        raise UnsupportedError(
            f"node {node.name!r} cannot be said in operator set {opset}, which is the newest that "
            f"the target reads: {reason} there",
            "choose another target or, if that is a weight's format, --quantize w8a8",
        )


def _fold(model: ir.Model) -> None:
    """Compute what depends on constants and shapes alone; coded weights stay coded."""
    from onnxscript import optimizer

    def wanted(node: ir.Node) -> bool | None:
        if node.op_type in CODED:
            return False
        return True if node.op_type == "ConstantOfShape" else None

    optimizer.fold_constants(model, should_fold=wanted)


def _spell_out(node: ir.Node, opset: int) -> None:
    if node.domain:
        return
    if node.op_type == "Sum" and len(node.inputs) == 2:
        # Bodies of ONNX's functions write so what the toolkit's own patterns know as an addition.
        node.op_type = "Add"
    if node.op_type in CODED and (len(node.inputs) < 3 or node.inputs[2] is None):
        _add_zero_point(node)
    for name, attribute in onnx.defs.get_schema(node.op_type, opset).attributes.items():
        if name not in node.attributes and attribute.default_value.name:
            node.attributes[name] = ir.serde.deserialize_attribute(attribute.default_value)


def _add_zero_point(node: ir.Node) -> None:
    graph, scale = node.graph, node.inputs[1]
    codes = node.inputs[0] if node.op_type == "DequantizeLinear" else node.outputs[0]
    assert isinstance(graph, ir.Graph)
    if scale is None or scale.shape is None or not scale.shape.is_static():
        return
    if codes is None or codes.dtype is None:
        return
    name = f"{node.outputs[0].name}.zero"
    zeros = ir.Tensor(np.zeros(scale.shape.numpy(), codes.dtype.numpy()), codes.dtype, name=name)
    value = ir.Value(name=name, const_value=zeros, shape=scale.shape)
    value.type = ir.TensorType(codes.dtype)
    graph.register_initializer(value)
    node.resize_inputs(3)
    node.replace_input_with(2, value)
