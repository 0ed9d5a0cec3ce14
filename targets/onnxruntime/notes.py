"""What a user should know about the weights and the state of a build."""

from __future__ import annotations

import collections

import onnx_ir as ir

from hal.ir import Graph
from hal.ir.cache_plan import FIXED_KEY, plan_of
from hal.targets.onnxruntime.quantized import STORED_KEY, is_upper_half
from hal.targets.onnxruntime.static import EXPANDED_KEY, runs_on_codes
from hal.targets.reading import WeightReads, bytes_read, decodes, float_bytes, part_of_experts

_LOADED = (
    "weights of convolutions have no kernel that reads their codes: they are expanded to floats"
    " when the model is loaded, which is as fast as floats, not faster"
)
_TWO_PRODUCTS = (
    "weights: 8-bit codes as two products of 4 bits, which is exact and small, but more arithmetic:"
    " few cores can be slower than with floats, unless activations have 8 bits as well (w8a8)"
)
_IN_EACH_CALL = (
    "weights have no kernel that reads their codes: each call expands them to floats, which is"
    " slower than not to quantize them"
)


def weights_read(model: ir.Model) -> WeightReads:
    """Of a legalized model: what a call reads, and what is not stored or read as it was."""
    stored = (node.metadata_props.get(STORED_KEY) for node in model.graph)
    reasons = collections.Counter(
        f"weights: {text}, which is what has a kernel" for text in stored if text
    )
    halves = sum(is_upper_half(node) for node in model.graph)
    if halves:
        reasons[_TWO_PRODUCTS] = halves
    made = [node for node in model.graph if EXPANDED_KEY in node.metadata_props]
    if made:
        reasons[_LOADED] = len(made)
    expanded = [node for node in model.graph if decodes(node) and not runs_on_codes(node)]
    if expanded:
        reasons[_IN_EACH_CALL] = len(expanded)
    once = _ancestors(made)
    total = bytes_read(
        model.graph,
        lambda node, index: 0.0 if node in once else _share(node, index),
        lambda node: not runs_on_codes(node),
    )
    return WeightReads(total + sum(float_bytes(node) for node in made), dict(reasons))


def cache_notes(graph: Graph, legal: Graph) -> list[str]:
    """What a step does to the state besides reading it, of ``graph`` and what it was made into."""
    if plan_of(graph) is None or legal.metadata.get(FIXED_KEY):
        return []
    return [
        "attention has no kernel that reads pages or codes: each step gathers the cache into one"
        " piece; the contiguous layout is read in place"
    ]


def _share(node: ir.Node, index: int) -> float | None:
    if node.op_type == "GatherBlockQuantized":
        return 0.0
    if node.op_type in ("MoE", "QMoE"):
        return part_of_experts(node, index, node.attributes.get_int("k", 0))
    return None


def _ancestors(nodes: list[ir.Node]) -> set[ir.Node]:
    """The nodes, and those whose results they are made of."""
    found: set[ir.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        found.add(node)
        makers = (value.producer() for value in node.inputs if value is not None)
        todo += [maker for maker in makers if maker is not None and maker not in found]
    return found
