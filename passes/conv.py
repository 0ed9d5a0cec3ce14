"""Folding of what follows a convolution into its weights."""

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
    is_constant,
    operand_orders,
    producer,
    rank,
    single_use,
    static_shape,
)
from hal.passes.base import Outcome, Pass


@dataclasses.dataclass(frozen=True)
class FoldConv(Pass):
    """Fold batch normalization and per-channel ``Mul``/``Add`` into ``Conv`` and its transpose.

    A batch normalization that follows no convolution becomes one ``Mul`` and one ``Add``.
    Preserves results up to rounding. The scaled weights are lazy: they are computed when read.
    """

    name: ClassVar[str] = "conv"

    def run(self, graph: Graph) -> Outcome:
        """Apply :data:`RULES` until nothing changes, at most three sweeps."""
        counts = apply_rules(graph, RULES, rounds=3)
        return Outcome(sum(counts.values()), counts)


def _batch_norm(edit: Editor, node: ir.Node) -> bool:
    """``scale * (x - mean) / sqrt(variance + epsilon) + bias``, all constants per channel."""
    if attribute(node, "training_mode", 0) or len(node.outputs) > 1:
        return False
    parameters = [array(v) for v in node.inputs[1:5]]
    source = node.inputs[0]
    if any(p is None for p in parameters) or source is None:
        return False
    scale, bias, mean, variance = (np.asarray(p, dtype=np.float64) for p in parameters)
    factor = scale / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
    offset = bias - mean * factor
    if _scale_conv(edit, node, source, factor, offset):
        return True
    size = rank(source)
    if size is None or source.dtype is None:
        return False
    shape = (1, -1, *[1] * (size - 2))
    dtype, out = source.dtype.numpy(), node.outputs[0]
    scaled = edit.op(
        "Mul", [source, edit.constant(factor.reshape(shape).astype(dtype), "scale")], like=out
    )
    shift = edit.constant(offset.reshape(shape).astype(dtype), "bias")
    return edit.replace(out, edit.op("Add", [scaled, shift], like=out))


def _multiply(edit: Editor, node: ir.Node) -> bool:
    for source, other in operand_orders(node):
        factor = _per_channel(other, source)
        if factor is not None and _scale_conv(edit, node, source, factor, None):
            return True
    return False


def _add(edit: Editor, node: ir.Node) -> bool:
    for source, other in operand_orders(node):
        offset = _per_channel(other, source)
        if offset is not None and _scale_conv(edit, node, source, None, offset):
            return True
    return False


def _per_channel(value: ir.Value, like: ir.Value) -> np.ndarray | None:
    """A constant ``[1, C, 1, …]`` or ``[C, 1, …]`` as a vector of C channels (axis 1)."""
    found, size = array(value), rank(like)
    conv = producer(like, "Conv", "ConvTranspose")
    if found is None or size is None or conv is None or found.ndim > size:
        return None
    shape = (*[1] * (size - found.ndim), *found.shape)
    channels = _channels(conv)
    if any(d != 1 for i, d in enumerate(shape) if i != 1) or shape[1] not in (1, channels):
        return None
    return np.broadcast_to(found.reshape(-1).astype(np.float64), (channels or 1,))


def _channels(conv: ir.Node) -> int | None:
    weight = conv.inputs[1]
    if weight is None or weight.shape is None or not weight.shape.is_static():
        return None
    shape = weight.shape.numpy()
    if conv.op_type == "Conv":
        return int(shape[0])
    return int(shape[1]) if attribute(conv, "group", 1) == 1 else None


def _scale_conv(
    edit: Editor,
    node: ir.Node,
    source: ir.Value,
    factor: np.ndarray | None,
    offset: np.ndarray | None,
) -> bool:
    """Replace ``node`` by the convolution before it with scaled weights and a new bias."""
    conv = producer(source, "Conv", "ConvTranspose")
    if conv is None or not single_use(source) or not is_constant(conv.inputs[1]):
        return False
    channels, weight = _channels(conv), conv.inputs[1]
    given = conv.inputs[2] if len(conv.inputs) > 2 else None
    bias = array(given) if given is not None else np.zeros(channels or 0)
    if channels is None or bias is None or weight is None or weight.const_value is None:
        return False
    new_bias = bias.astype(np.float64)
    if factor is not None:
        new_bias = new_bias * factor
        weight = _scaled_weight(edit, weight, factor, 0 if conv.op_type == "Conv" else 1)
    if offset is not None:
        new_bias = new_bias + offset
    assert weight.dtype is not None
    base = given.name if given is not None and given.name else f"{conv.inputs[1].name}.bias"  # type: ignore[union-attr]
    constant = edit.constant(new_bias.astype(weight.dtype.numpy()), base)
    attributes = {k: a.value for k, a in conv.attributes.items()}
    out = node.outputs[0]
    inputs = [conv.inputs[0], weight, constant]
    return edit.replace(out, edit.op(conv.op_type, inputs, attributes, like=out))


def _scaled_weight(edit: Editor, weight: ir.Value, factor: np.ndarray, axis: int) -> ir.Value:
    tensor = weight.const_value
    assert tensor is not None
    shape = [1] * len(tensor.shape)
    shape[axis] = -1
    by_channel = factor.reshape(shape)

    def compute() -> ir.TensorProtocol:
        scaled = tensor.numpy().astype(np.float64) * by_channel
        return ir.Tensor(scaled.astype(tensor.dtype.numpy()), dtype=tensor.dtype)

    lazy = ir.LazyTensor(compute, dtype=tensor.dtype, shape=ir.Shape(static_shape(tensor)))
    return edit.tensor(lazy, f"{weight.name}.folded")


RULES: tuple[Rule, ...] = (
    Rule("batch norm", ("BatchNormalization",), _batch_norm),
    Rule("multiply", ("Mul",), _multiply),
    Rule("add", ("Add",), _add),
)
