"""How many bytes of weights a call reads: what quantization can gain where memory is the limit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import onnx_ir as ir

from hal.ir import HAL_DOMAIN

Share = Callable[[ir.Node, int], float | None]
"""Part of an input of a node, by its index, that one token reads; None for what is usual."""

_WEIGHT = 4096


@dataclasses.dataclass(frozen=True)
class WeightReads:
    """What a graph as a backend runs it reads of weights.

    Attributes:
        bytes: in a call with one token (or one example).
        reasons: how weights are not read as the neutral graph stores them, and how many: the rest
            of a sentence that begins with their number.
    """

    bytes: int
    reasons: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def notes(self) -> list[str]:
        """The reasons as sentences."""
        return [f"{count} {reason}" for reason, count in self.reasons.items()]


def bytes_read(
    graph: ir.Graph,
    share: Share = lambda node, index: None,
    expanded: Callable[[ir.Node], bool] = lambda node: True,
) -> int:
    """Bytes of initializers that a call with one token or one example reads.

    Of a table it reads a row (counted as nothing), of experts those that a token chooses, of other
    weights everything. Where codes are ``expanded`` to floats, the floats are read as well.
    """
    total = 0.0
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None:
            total += tensor.nbytes * max(
                (_part(u.node, u.idx, share) for u in value.uses()), default=0
            )
    total += sum(float_bytes(node) for node in graph if decodes(node) and expanded(node))
    return round(total)


def decodes(node: ir.Node) -> bool:
    """Whether a node makes numbers of the codes of a weight that is stored."""
    codes = node.inputs[0] if node.inputs else None
    if node.op_type != "DequantizeLinear" or node.domain or codes is None:
        return False
    unpack = codes.producer()
    if unpack is not None and unpack.domain == HAL_DOMAIN and unpack.op_type == "UnpackBits":
        codes = unpack.inputs[0]
    stored = codes.const_value if codes is not None else None
    return stored is not None and math.prod(stored.shape.numpy()) >= _WEIGHT


def float_bytes(node: ir.Node) -> int:
    """Bytes of the node's first result; 0 where its shape is not known."""
    value = node.outputs[0]
    if value.shape is None or not value.shape.is_static():
        return 0
    size = 4.0 if value.dtype is None else value.dtype.itemsize
    return int(math.prod(value.shape.numpy()) * size)


def _part(node: ir.Node, index: int, share: Share) -> float:
    found = share(node, index)
    if found is not None:
        return found
    if node.op_type == "Gather" and not node.domain and index == 0:
        return 0.0
    if node.op_type == "MixtureOfExperts" and node.domain == HAL_DOMAIN:
        chosen = node.inputs[1].shape if node.inputs[1] is not None else None
        return part_of_experts(node, index, chosen[-1] if chosen is not None else None)
    return 1.0


def part_of_experts(node: ir.Node, index: int, chosen: object) -> float:
    """``chosen`` of the experts that an input holds along its first axis; 1 if not known."""
    weight = node.inputs[index]
    experts = weight.shape[0] if weight is not None and weight.shape else None
    if not isinstance(experts, int) or not isinstance(chosen, int) or experts < 1:
        return 1.0
    return min(1.0, chosen / experts)


__all__ = ["Share", "WeightReads", "bytes_read", "decodes", "float_bytes", "part_of_experts"]
