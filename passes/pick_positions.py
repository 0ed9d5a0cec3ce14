"""Compute a language model's logits at chosen positions only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from hal.ir import Graph
from hal.ir.picks import LOGITS, PICK
from hal.passes._edit import Editor, is_constant, is_op, producer, rank, same_extents, single_use
from hal.passes.base import Outcome, Pass

_UNARY = ("Cast", "Identity", "Tanh", "Neg")
_WITH_CONSTANTS = ("Add", "Sub", "Mul", "Div", "Min", "Max")
_OF_WEIGHTS = ("Transpose", "Cast", "Identity", "Mul", "DequantizeLinear", "Constant", "Reshape")


@dataclasses.dataclass(frozen=True)
class PickPositions(Pass):
    """Take rows before the product with the vocabulary's weight, by a new input ``hal.pick``.

    ``logits`` become ``[batch, picks, vocab]``. Preserves each picked position's logits; positions
    that nobody asks for cost nothing, which is most of the product of a prompt. A graph that is no
    language model, or whose logits come about in another way, is left alone.
    """

    name: ClassVar[str] = "pick_positions"

    def run(self, graph: Graph) -> Outcome:
        """Change the one product, or nothing."""
        found = _find(graph)
        if found is None:
            return Outcome(0)
        product, chain = found
        edit = Editor(graph)
        edit.at(product)
        x = product.inputs[0]
        assert x is not None
        assert x.shape is not None
        batch, width = x.shape[0], x.shape[2]
        pick = ir.Value(
            name=PICK, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([batch, "picks"])
        )
        graph.graph.inputs.append(pick)
        index = edit.op("Unsqueeze", [pick, edit.constant([2], "axes", np.int64)])
        index.type, index.shape = pick.type, ir.Shape([batch, "picks", 1])
        picked = edit.op("GatherND", [x, index], {"batch_dims": 1})
        picked.type, picked.shape = x.type, ir.Shape([batch, "picks", width])
        product.replace_input_with(0, picked)
        for value in chain:
            assert value.shape is not None
            value.shape = ir.Shape([batch, "picks", value.shape[2]])
        return Outcome(1, {"steps after the product": len(chain) - 1})


def _find(graph: Graph) -> tuple[ir.Node, list[ir.Value]] | None:
    """The product, and the values from it to the logits; None if there is no such thing."""
    carried = {s.input for s in graph.state}
    ids = next((v for v in graph.graph.inputs if v.name not in carried), None)
    value = next((v for v in graph.graph.outputs if v.name == LOGITS), None)
    if graph.metadata.get("task") != "causal-lm" or not carried or ids is None or value is None:
        return None
    if ids.shape is None or len(ids.shape) != 2 or value.uses():
        return None
    chain: list[ir.Value] = []
    while value is not None and value.shape is not None:
        by_position = len(value.shape) == 3 and same_extents(value.shape[:2], ids.shape)
        if not by_position or (chain and not single_use(value)):
            return None
        chain.append(value)
        product = producer(value, "MatMul")
        if product is not None:
            return (product, chain) if _takes_rows(product, ids) else None
        value = _by_position(value.producer())
    return None


def _takes_rows(product: ir.Node, ids: ir.Value) -> bool:
    x, weight = product.inputs[:2]
    if x is None or x.shape is None or ids.shape is None or len(x.shape) != 3:
        return False
    return same_extents(x.shape[:2], ids.shape) and rank(weight) == 2 and _is_weight(weight)


def _by_position(node: ir.Node | None) -> ir.Value | None:
    """The input that every position of a node's result depends on at that position only."""
    if node is None or not is_op(node, *_UNARY, *_WITH_CONSTANTS):
        return None
    operands = [v for v in node.inputs if v is not None]
    data = [v for v in operands if not _is_weight(v)]
    others = [v for v in operands if _is_weight(v)]
    if len(data) != 1 or not all(_is_of_channels(v.shape) for v in others):
        return None
    return data[0]


def _is_of_channels(shape: Sequence[int | ir.SymbolicDim] | ir.Shape | None) -> bool:
    """Whether a constant is the same at every position."""
    return shape is not None and all(d == 1 for d in list(shape)[:-1])


def _is_weight(value: ir.Value | None) -> bool:
    """Whether a value is made of constants alone."""
    if value is None or is_constant(value):
        return value is not None
    node = value.producer()
    if node is None or not is_op(node, *_OF_WEIGHTS):
        return False
    return all(v is None or _is_weight(v) for v in node.inputs)
