"""Fusion to ``LayerNormalization``."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from hal.ir import Graph
from hal.passes._edit import (
    Editor,
    Rule,
    apply_rules,
    dim,
    operand_orders,
    producer,
    single_use,
)
from hal.passes._forms import mean, over_root, per_channel, square
from hal.passes._norm import (
    attributes,
    mean_plus_epsilon,
    unit_weight,
    weight_after,
    with_inputs,
)
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
        center, averaged = _centered(deviation), mean_plus_epsilon(radicand)
        if center is None or averaged is None or averaged[1] != center[1]:
            continue
        squared = square(averaged[0])
        same = squared is not None and (squared is deviation or _centered(squared) == center)
        extents = [dim(center[0], a) for a in center[1]]
        if not same or None in extents:
            continue
        source, result = center[0], node.outputs[0]
        sizes = [e or 0 for e in extents]
        inputs = [source, unit_weight(edit, source, sizes)]
        fused = edit.op("LayerNormalization", inputs, attributes(sizes, averaged[2]), like=result)
        return edit.replace(result, fused)
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
            return with_inputs(edit, norm, [norm.inputs[0], weight, bias], node)
    return False


RULES: tuple[Rule, ...] = (
    Rule("layer norm", ("Mul", "Div"), _normalize),
    Rule("weight", ("Mul",), weight_after("LayerNormalization")),
    Rule("bias", ("Add",), _bias),
)
