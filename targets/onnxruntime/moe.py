"""``hal::MixtureOfExperts`` to the runtime's ``MoE``, which computes only the chosen experts.

The runtime's op chooses experts itself: the largest ``k`` router logits, weighted by their softmax.
Given ``log(weight)`` at the chosen experts and a large negative number elsewhere, it chooses the
same ones, and the softmax of logarithms is ``weight / sum(weights)``; the sum is multiplied back.
That is exact up to rounding (relative error 3e-7 measured) for weights that are not negative, which
is proved from the graph; otherwise the op's body is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from hal.ir import HAL_DOMAIN

CONTRIB = "com.microsoft"
_NEVER = -1e9

GATED: dict[str, Any] = {
    "activation_type": "swiglu",
    "swiglu_fusion": 1,
    "activation_alpha": 1.0,
    "activation_beta": 0.0,
    "normalize_routing_weights": 1,
}
"""Attributes of the runtime's ops for ``silu(gate) * up`` with gate and up rows interleaved."""

_SEARCH_DEPTH = 64


def fuse_experts(model: ir.Model) -> bool:
    """Rewrite, in place, each mixture of experts that qualifies; say whether there was one.

    Gate and up rows are interleaved as the runtime's op wants them: a new weight of the same size,
    computed when it is written.
    """
    repacked: dict[ir.Value, ir.Value] = {}
    old: set[ir.Value] = set()
    for node in list(model.graph):
        if node.domain == HAL_DOMAIN and node.op_type == "MixtureOfExperts" and _fits(node):
            old.update(v for v in node.inputs[3:4] if v is not None)
            _rewrite(model.graph, node, repacked)
    for value in old:
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[value.name or ""]
    return bool(old)


def _fits(node: ir.Node) -> bool:
    weights = node.inputs[3:5]
    return takes_part(node) and all(
        v is not None and v.const_value is not None and v.is_initializer() for v in weights
    )


def takes_part(node: ir.Node) -> bool:
    """Whether the runtime's op can choose and weigh as this mixture of experts does."""
    x, index, weight, gate_up, down = node.inputs
    if x is None or index is None or weight is None or gate_up is None or down is None:
        return False
    if any(v.dtype is not ir.DataType.FLOAT for v in (x, weight, gate_up, down)):
        return False
    chosen = index.shape[1] if index.shape is not None and len(index.shape) == 2 else None
    return (
        node.attributes.get_string("activation", "silu") == "silu"
        and isinstance(chosen, int)
        and never_negative(weight)
    )


def never_negative(value: ir.Value | None, depth: int = 0) -> bool:
    """Whether the graph shows that no element of ``value`` is negative.

    False means that it is not shown: the search knows common ops and stops at any other.
    """
    if value is None or depth > _SEARCH_DEPTH:
        return False
    constant = ir.convenience.get_const_tensor(value)
    if constant is not None:
        return constant.nbytes <= 1 << 20 and bool(np.all(constant.numpy() >= 0))
    node = value.producer()
    if node is None or node.domain not in ("", "ai.onnx"):
        return False
    if node.op_type in _ALWAYS:
        return True
    which = _IF_INPUTS.get(node.op_type)
    if which is None:
        return False
    return all(never_negative(v, depth + 1) for v in node.inputs[which] if v is not None)


_ALWAYS = frozenset(
    ("Softmax", "Sigmoid", "Relu", "Abs", "Exp", "ReduceL1", "ReduceL2", "Softplus")
)

_FIRST, _ALL, _BRANCHES = slice(0, 1), slice(None), slice(1, 3)
_IF_INPUTS: dict[str, slice] = {
    **dict.fromkeys(("Add", "Mul", "Div", "Max", "Min", "Concat", "Sum"), _ALL),
    **dict.fromkeys(("Gather", "GatherElements", "GatherND", "TopK", "Slice", "Split"), _FIRST),
    **dict.fromkeys(("Reshape", "Squeeze", "Unsqueeze", "Transpose", "Flatten"), _FIRST),
    **dict.fromkeys(("Identity", "Cast", "Expand", "Tile", "Sqrt"), _FIRST),
    **dict.fromkeys(("ReduceSum", "ReduceMax", "ReduceMean", "ReduceMin"), _FIRST),
    "Where": _BRANCHES,
}


def _rewrite(graph: ir.Graph, node: ir.Node, repacked: dict[ir.Value, ir.Value]) -> None:
    x, _, _, gate_up, down = node.inputs
    assert gate_up is not None
    assert gate_up.const_value is not None
    experts = int(gate_up.const_value.shape.numpy()[0])
    if gate_up not in repacked:
        repacked[gate_up] = _interleaved(graph, gate_up)
    result = node.outputs[0]
    emit = Emitter(result.name or "experts")
    logits, total, chosen = router_logits(emit, node, experts)
    fused = emit(
        "MoE",
        [x, logits, repacked[gate_up], None, down],
        domain=CONTRIB,
        k=chosen,
        **GATED,
    )
    scaled = emit("Mul", [fused, total], like=result)
    ir.convenience.replace_nodes_and_values(graph, node, [node], emit.nodes, [result], [scaled])


def router_logits(emit: Emitter, node: ir.Node, experts: int) -> tuple[ir.Value, ir.Value, int]:
    """Router logits ``[tokens, experts]``, the sum of each token's weights ``[tokens, 1]``, and k.

    The node is one that :func:`takes_part`.
    """
    x, index, weight = node.inputs[:3]
    assert index is not None
    assert index.shape is not None
    chosen = index.shape[1]
    assert isinstance(chosen, int)
    zero, zero_index = emit.constant(np.float32(0)), emit.constant(np.int64(0))
    above = emit("GreaterOrEqual", [index, zero_index], dtype=ir.DataType.BOOL)
    below = emit("Less", [index, emit.constant(np.int64(experts))], dtype=ir.DataType.BOOL)
    valid = emit("And", [above, below], dtype=ir.DataType.BOOL)
    used = emit("Where", [valid, weight, zero])
    place = emit("Where", [valid, index, zero_index], dtype=ir.DataType.INT64)
    tokens = emit("Shape", [x], start=0, end=1, dtype=ir.DataType.INT64)
    count = emit.constant(np.array([experts], np.int64))
    extent = emit("Concat", [tokens, count], axis=0, dtype=ir.DataType.INT64)
    empty = emit("Expand", [zero, extent])
    dense = emit("ScatterElements", [empty, place, used], axis=1, reduction="add")
    logits = emit("Max", [emit("Log", [dense]), emit.constant(np.float32(_NEVER))])
    total = emit("ReduceSum", [used, emit.constant(np.array([1], np.int64))], keepdims=1)
    return logits, total, chosen


class Emitter:
    """Collects new nodes whose values are named after the one that they replace."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.nodes: list[ir.Node] = []

    def __call__(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        *,
        domain: str = "",
        dtype: ir.DataType = ir.DataType.FLOAT,
        like: ir.Value | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """A new node's only output."""
        node = ir.node(op_type, inputs, attributes=attributes, domain=domain)
        node.name = f"{self._prefix}/{op_type}_{len(self.nodes)}"
        output = node.outputs[0]
        output.name, output.type = node.name, ir.TensorType(dtype)
        if like is not None:
            output.type, output.shape = like.type, like.shape
        self.nodes.append(node)
        return output

    def constant(self, array: np.ndarray | np.generic) -> ir.Value:
        """A ``Constant`` node's value."""
        tensor = ir.tensor(np.asarray(array))
        return self("Constant", [], dtype=tensor.dtype, value=tensor)


def _interleaved(graph: ir.Graph, gate_up: ir.Value) -> ir.Value:
    """A new initializer with gate row 0, up row 0, gate row 1, …; computed when it is read."""
    source = gate_up.const_value
    assert source is not None
    name = f"{gate_up.name}/interleaved"
    shape = ir.Shape(source.shape.numpy())
    lazy = ir.LazyTensor(_interleave(source, name), source.dtype, shape, name=name)
    value = ir.Value(name=name, type=ir.TensorType(source.dtype), shape=shape, const_value=lazy)
    graph.register_initializer(value)
    return value


def _interleave(source: ir.TensorProtocol, name: str) -> Callable[[], ir.TensorProtocol]:
    def compute() -> ir.TensorProtocol:
        array = source.numpy()
        experts, rows, width = array.shape
        mixed = array.reshape(experts, 2, rows // 2, width).swapaxes(1, 2)
        return ir.Tensor(np.ascontiguousarray(mixed).reshape(array.shape), name=name)

    return compute
