"""Fusion to ``Swish`` and ``SwiGLU``."""

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
    operand_orders,
    producer,
    same_dims,
    single_use,
)
from hal.passes._forms import scaled
from hal.passes.base import Outcome, Pass


@dataclasses.dataclass(frozen=True)
class FuseGatedMlp(Pass):
    """Fuse ``x * sigmoid(a x)`` into ``Swish``, and ``Swish(gate) * value`` into ``SwiGLU``.

    Preserves results up to rounding. The gate and value projections stay separate products: a
    target that gains from one wide product can concatenate the weights itself.
    """

    name: ClassVar[str] = "gated_mlp"

    def run(self, graph: Graph) -> Outcome:
        """Apply :data:`RULES` until nothing changes."""
        counts = apply_rules(graph, RULES, rounds=2)
        return Outcome(sum(counts.values()), counts)


def _swish(edit: Editor, node: ir.Node) -> bool:
    for x, other in operand_orders(node):
        sigmoid = producer(other, "Sigmoid")
        if sigmoid is None or sigmoid.inputs[0] is None:
            continue
        source, alpha = sigmoid.inputs[0], 1.0
        if source is not x:
            source, alpha = scaled(source)
        if source is x:
            out = node.outputs[0]
            attributes = {} if alpha == 1.0 else {"alpha": alpha}
            return edit.replace(out, edit.op("Swish", [x], attributes, like=out))
    return False


def _swiglu(edit: Editor, node: ir.Node) -> bool:
    """Only for equal shapes: the op does not broadcast."""
    for activated, value in operand_orders(node):
        swish = producer(activated, "Swish")
        if swish is None or not single_use(activated) or not same_dims(activated, value):
            continue
        alpha = attribute(swish, "alpha", 1.0)
        attributes = {} if alpha == 1.0 else {"alpha": alpha}
        out = node.outputs[0]
        fused = edit.op("SwiGLU", [swish.inputs[0], value], attributes, like=out)
        return edit.replace(out, fused)
    return False


RULES: tuple[Rule, ...] = (
    Rule("SwiGLU", ("Mul",), _swiglu),
    Rule("Swish", ("Mul",), _swish),
)
