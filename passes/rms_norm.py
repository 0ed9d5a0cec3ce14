"""Fusion to ``RMSNormalization``."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from hal.ir import Graph
from hal.passes._edit import (
    Editor,
    Rule,
    apply_rules,
    attribute,
    dim,
    operand_orders,
    producer,
    rank,
    single_use,
)
from hal.passes._forms import over_root, per_channel, square
from hal.passes._norm import attributes, mean_plus_epsilon, unit_weight, weight_after
from hal.passes.base import Outcome, Pass


@dataclasses.dataclass(frozen=True)
class FuseRmsNorm(Pass):
    """Fuse ``x / sqrt(mean(x * x) + epsilon) * weight`` into one ``RMSNormalization``.

    Preserves results up to rounding: where the source normalizes in float32 and casts back before
    the weight, so does the fused op; other casts stay in the graph. Weights that were stored with
    an offset (``1 + w``) must have been folded before.
    """

    name: ClassVar[str] = "rms_norm"

    def run(self, graph: Graph) -> Outcome:
        """Apply :data:`RULES`."""
        counts = apply_rules(graph, RULES, rounds=2)
        return Outcome(sum(counts.values()))


def _normalize(edit: Editor, node: ir.Node) -> bool:
    for x, radicand in over_root(node):
        averaged = mean_plus_epsilon(radicand)
        if averaged is None or square(averaged[0]) is not x:
            continue
        axes, size = averaged[1], rank(x)
        extents = [dim(x, a) for a in axes]
        if size is None or None in extents:
            continue
        return _emit(edit, node, x, averaged[2], [e for e in extents if e is not None])
    return False


def _emit(edit: Editor, node: ir.Node, x: ir.Value, epsilon: float, extents: list[int]) -> bool:
    result, source = node.outputs[0], x
    down = _only_user(result, "Cast")
    up = producer(x, "Cast")
    origin = up.inputs[0] if up is not None else None
    if down is not None and origin is not None and origin.dtype == attribute(down, "to"):
        result, source = down.outputs[0], origin
    last, weight = _weighted(result, extents)
    if weight is None:
        weight = unit_weight(edit, source, extents)
    fused = edit.op(
        "RMSNormalization",
        [source, weight],
        attributes(extents, epsilon),
        like=last,
        before=last.producer(),
    )
    return edit.replace(last, fused)


def _weighted(result: ir.Value, extents: list[int]) -> tuple[ir.Value, ir.Value | None]:
    """The product of ``result`` and its weight, if multiplying by one is all that is done to it."""
    scale = _only_user(result, "Mul")
    if scale is not None:
        for source, other in operand_orders(scale):
            if source is result and per_channel(other, extents) and other.dtype == result.dtype:
                return scale.outputs[0], other
    return result, None


def _only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    if not single_use(value):
        return None
    user = next(iter(value.uses())).node
    return user if user.op_type == op_type and user.domain in ("", "ai.onnx") else None


RULES: tuple[Rule, ...] = (
    Rule("weight after norm", ("Mul",), weight_after("RMSNormalization")),
    Rule("rms norm", ("Mul", "Div"), _normalize),
)
