"""Restating nodes in another version of the ONNX operator set, where that keeps their meaning.

Kernels are registered for certain schema versions, so the version that a model is stamped with
decides which kernels its nodes get. Most schema revisions only add dtypes; a node that does not use
the addition may be stamped with the older version.
"""

from __future__ import annotations

import dataclasses

import onnx
import onnx_ir as ir

from hal.targets.onnxruntime.kernels import parameter_types

OLDEST = 20
"""Oldest version considered, unless a runtime reads none so new. Schemas since 19 differ only in
what :func:`restate` checks."""


@dataclasses.dataclass(frozen=True)
class Restatement:
    """Attributes to drop (at their default) and to spell out (whose default changed)."""

    drop: tuple[str, ...] = ()
    add: tuple[ir.Attr, ...] = ()

    def apply(self, node: ir.Node) -> None:
        """Edit the node's attributes in place."""
        for name in self.drop:
            del node.attributes[name]
        for attribute in self.add:
            node.attributes[attribute.name] = attribute


def restate(node: ir.Node, version: int, target: int) -> Restatement | str:
    """How to write ``node`` of opset ``version`` in opset ``target``, or why that is impossible."""
    if node.domain not in ("", "ai.onnx") or version == target:
        return Restatement()
    try:
        old = onnx.defs.get_schema(node.op_type, version)
        new = onnx.defs.get_schema(node.op_type, target)
    except onnx.defs.SchemaError:
        return f"{node.op_type} does not exist in opset {target}"
    if old.since_version == new.since_version:
        return Restatement()
    reason = _changed_meaning(node, target)
    if reason:
        return reason
    if not (new.min_input <= len(node.inputs) <= new.max_input):
        return f"{node.op_type} takes other inputs in opset {target}"
    if not (new.min_output <= len(node.outputs) <= new.max_output):
        return f"{node.op_type} has other outputs in opset {target}"
    refused = _refused_dtype(node, new)
    if refused:
        return f"{node.op_type} does not take {refused} in opset {target}"
    return _attributes(node, old, new, target)


def _attributes(
    node: ir.Node, old: onnx.defs.OpSchema, new: onnx.defs.OpSchema, target: int
) -> Restatement | str:
    drop, add = [], []
    for name, attribute in node.attributes.items():
        if name in new.attributes:
            continue
        default = _default(old, name)
        if default is None or default.value != attribute.value:
            return f"{node.op_type} has no attribute {name} in opset {target}"
        drop.append(name)
    for name in old.attributes:
        if name in node.attributes or name not in new.attributes:
            continue
        before, after = _default(old, name), _default(new, name)
        if (before.value if before else None) != (after.value if after else None):
            if before is None:
                return f"{node.op_type} needs attribute {name} in opset {target}"
            add.append(before)
    return Restatement(tuple(drop), tuple(add))


def _default(schema: onnx.defs.OpSchema, name: str) -> ir.Attr | None:
    if name not in schema.attributes:
        return None
    proto = schema.attributes[name].default_value
    return ir.serde.deserialize_attribute(proto) if proto.name else None


def _refused_dtype(node: ir.Node, schema: onnx.defs.OpSchema) -> str:
    allowed = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
    types = parameter_types(node, schema)
    for formal in (*schema.inputs, *schema.outputs):
        wrong = types.get(formal.type_str, set()) - allowed.get(formal.type_str, {formal.type_str})
        if wrong:
            return sorted(wrong)[0]
    return ""


def _changed_meaning(node: ir.Node, target: int) -> str:
    """Revisions that changed what a node computes without changing its signature."""
    ceil = node.attributes.get_int("ceil_mode", 0)
    if node.op_type in ("AveragePool", "MaxPool", "LpPool") and ceil and target < 22:
        return f"{node.op_type} with ceil_mode counts windows differently before opset 22"
    if node.op_type == "Attention" and target < 24:
        return "Attention aligns causal masks differently before opset 24"
    if node.op_type == "GroupNormalization" and target < 21:
        return "GroupNormalization scales groups, not channels, before opset 21"
    if node.op_type in ("GridSample", "DFT") and target < 20:
        return f"{node.op_type} has other attributes before opset 20"
    floats = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    modulo = node.op_type == "Mod" and not node.attributes.get_int("fmod", 0)
    if modulo and target < 28 and node.inputs[0] is not None and node.inputs[0].dtype in floats:
        return "Mod of floats without fmod does not exist before opset 28"
    return ""
