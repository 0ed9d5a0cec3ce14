"""Fusion to ``LayerNormalization``."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from hal.ir import Graph
from hal.passes._edit import (
    Editor,
    Rule,
    apply_rules,
    array,
    attribute,
    dim,
    operand_orders,
    producer,
    single_use,
)
from hal.passes._forms import mean, over_root, per_channel, plus_epsilon, square
from hal.passes.base import Outcome, Pass


@dataclasses.dataclass(frozen=True)
class FuseLayerNorm(Pass):
    """Fuse ``(x - mean) / sqrt(variance + epsilon) * weight + bias`` into ``LayerNormalization``.

    Preserves results up to rounding. Only trailing axes can be normalized by the fused op; a norm
    over another axis (channels first) stays as it is.
    """

    name: ClassVar[str] = "layer_norm"

    def run(self, graph: Graph) -> Outcome:
        """Fuse the statistics first, then weights, then biases."""
        counts = apply_rules(graph, RULES, rounds=3)
        return Outcome(counts.get("layer norm", 0), counts)


def _centered(value: ir.Value) -> tuple[ir.Value, list[int]] | None:
    """``(x, axes)`` if ``value`` is ``x - mean(x)``."""
    node = producer(value, "Sub")
    average = mean(node.inputs[1]) if node is not None and node.inputs[1] is not None else None
    if node is None or average is None or average[0] is not node.inputs[0]:
        return None
    return average


def _normalize(edit: Editor, node: ir.Node) -> bool:
    for deviation, radicand in over_root(node):
        center, parts = _centered(deviation), plus_epsilon(radicand)
        variance = mean(parts[0]) if parts is not None else None
        if center is None or parts is None or variance is None or variance[1] != center[1]:
            continue
        squared = square(variance[0])
        same = squared is not None and (squared is deviation or _centered(squared) == center)
        extents = [dim(center[0], a) for a in center[1]]
        if not same or None in extents:
            continue
        source, result = center[0], node.outputs[0]
        dtype = (source.dtype or ir.DataType.FLOAT).numpy()
        ones = edit.constant(np.ones([e or 0 for e in extents], dtype=dtype), "ones")
        attributes = {"axis": -len(extents), "epsilon": parts[1], "stash_type": 1}
        fused = edit.op("LayerNormalization", [source, ones], attributes, like=result)
        return edit.replace(result, fused)
    return False


def _weight(edit: Editor, node: ir.Node) -> bool:
    for source, weight in operand_orders(node):
        norm = producer(source, "LayerNormalization")
        if norm is None or not single_use(source) or len(norm.inputs) > 2:
            continue
        ones = array(norm.inputs[1])
        shape = (
            list(norm.inputs[1].shape.numpy()) if norm.inputs[1] and norm.inputs[1].shape else []
        )
        if ones is None or not np.all(ones == 1) or not per_channel(weight, shape):
            continue
        return _rebuild(edit, node, norm, [norm.inputs[0], weight])
    return False


def _bias(edit: Editor, node: ir.Node) -> bool:
    for source, bias in operand_orders(node):
        norm = producer(source, "LayerNormalization")
        if norm is None or not single_use(source) or len(norm.inputs) > 2:
            continue
        weight = norm.inputs[1]
        if weight is None or weight.shape is None or not weight.shape.is_static():
            continue
        if per_channel(bias, list(weight.shape.numpy())):
            return _rebuild(edit, node, norm, [norm.inputs[0], weight, bias])
    return False


def _rebuild(edit: Editor, node: ir.Node, norm: ir.Node, inputs: list[ir.Value | None]) -> bool:
    attributes = {
        "axis": attribute(norm, "axis", -1),
        "epsilon": attribute(norm, "epsilon", 1e-5),
        "stash_type": attribute(norm, "stash_type", 1),
    }
    result = node.outputs[0]
    return edit.replace(result, edit.op("LayerNormalization", inputs, attributes, like=result))


RULES: tuple[Rule, ...] = (
    Rule("layer norm", ("Mul", "Div"), _normalize),
    Rule("weight", ("Mul",), _weight),
    Rule("bias", ("Add",), _bias),
)
