"""Constant folding, including shape computations whose result is known or can be said shorter."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes import common

from hal.ir import IR_VERSION, OPSET, Graph
from hal.passes._edit import (
    Editor,
    attribute,
    ints,
    is_constant,
    is_op,
    remove_unused,
    static_shape,
)
from hal.passes._symbolic import Shapes, analyse, known
from hal.passes.base import Outcome, Pass

RANDOM = frozenset({"RandomUniform", "RandomNormal", "RandomUniformLike", "RandomNormalLike",
                    "Multinomial", "Bernoulli", "Dropout"})  # fmt: skip
KEPT = frozenset({"DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear"})
"""Folding these would undo a quantization."""


@dataclasses.dataclass(frozen=True)
class Fold(Pass):
    """Compute at compile time what depends on constants or only on static extents.

    Preserves results exactly. Shape arithmetic ends as a constant where it can (a ``Reshape`` to
    ``[batch, sequence, 4, 16]`` becomes one to ``[0, 0, 4, 16]``). A constant of more than
    ``small`` bytes is never computed here: it becomes a lazy tensor that is evaluated when its
    bytes are read, and only if it is no larger than what it replaces. A weight that others use too
    (an embedding tied to the output layer) is not folded: it would be stored twice. Ops of other
    domains stay.
    """

    name: ClassVar[str] = "fold"
    small: int = 65536

    def run(self, graph: Graph) -> Outcome:
        """Fold to a fixed point, at most four sweeps."""
        before = graph.node_count()
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph.model)
        common.LiftSubgraphInitializersToMainGraphPass()(graph.model)
        changes = 0
        for _ in range(4):
            changed = _fold_constants(graph, self.small) + _fold_shapes(graph)
            remove_unused(graph)
            changes += changed
            if not changed:
                break
        return Outcome(changes, {"removed": before - graph.node_count()} if changes else {})


# --- nodes whose inputs are all constants ------------------------------------------------------


def _fold_constants(graph: Graph, small: int) -> int:
    edit, changed = Editor(graph), 0
    for node in list(graph.nodes()):
        if _foldable(node):
            edit.at(node)
            changed += _fold_node(edit, node, small)
    return changed


def _foldable(node: ir.Node) -> bool:
    if node.domain not in ("", "ai.onnx") or node.op_type in RANDOM or node.op_type in KEPT:
        return False
    if not node.inputs or len(node.outputs) != 1 or node.outputs[0].is_graph_output():
        return False
    if any(a.is_ref() or a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
           for a in node.attributes.values()):  # fmt: skip
        return False
    return all(value is None or is_constant(value) for value in node.inputs) and any(
        value is not None for value in node.inputs
    )


def _fold_node(edit: Editor, node: ir.Node, small: int) -> int:
    result = node.outputs[0]
    tensors = [v.const_value if v is not None else None for v in node.inputs]
    size_in = sum(t.nbytes for t in tensors if t is not None)
    size_out = _nbytes(node)
    if size_in <= small and (size_out is None or size_out <= max(small, size_in)):
        computed = _evaluate(node, tensors)
        if computed is None or computed.nbytes > max(small, size_in):
            return 0
        tensor: ir.TensorProtocol = computed
    elif size_out is not None and size_out <= size_in and result.dtype is not None:
        if any(v is not None and len(v.uses()) > 1 for v in node.inputs if not _is_small(v, small)):
            return 0
        tensor = _lazy(node, tensors)
    else:
        return 0
    folded = edit.tensor(tensor, _name(node))
    edit.replace(result, folded)
    return 1


def _is_small(value: ir.Value | None, small: int) -> bool:
    return value is None or value.const_value is None or value.const_value.nbytes <= small


def _name(node: ir.Node) -> str:
    """A transposed weight keeps the weight's name in its own."""
    source = node.inputs[0]
    if is_op(node, "Transpose") and source is not None and source.name:
        return f"{source.name}.transposed"
    return node.outputs[0].name or "folded"


def _nbytes(node: ir.Node) -> int | None:
    """Bytes of a node's output if its shape and dtype can be told without computing it."""
    result, source = node.outputs[0], node.inputs[0]
    if is_op(node, "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten"):
        tensor = source.const_value if source is not None else None
        if tensor is None:
            return None
        result.type = ir.TensorType(tensor.dtype)
        if is_op(node, "Transpose", "Identity"):
            result.shape = ir.Shape(_permuted(node, list(tensor.shape)))
    if result.shape is None or result.dtype is None or not result.shape.is_static():
        return None
    return math.ceil(math.prod(result.shape.numpy()) * result.dtype.itemsize)


def _permuted(node: ir.Node, shape: list[Any]) -> list[Any]:
    if not is_op(node, "Transpose"):
        return shape
    order = attribute(node, "perm") or tuple(reversed(range(len(shape))))
    return [shape[i] for i in order]


def _lazy(node: ir.Node, tensors: Sequence[ir.TensorProtocol | None]) -> ir.LazyTensor:
    """The node's result as a tensor that is computed each time its bytes are read."""
    result = node.outputs[0]
    assert result.shape is not None
    assert result.dtype is not None
    if is_op(node, "Transpose"):
        source, order = tensors[0], attribute(node, "perm")
        assert source is not None

        def compute() -> ir.TensorProtocol:
            return ir.Tensor(np.transpose(source.numpy(), order), dtype=source.dtype)
    else:
        proto = ir.serde.serialize_node(node)
        names = [v.name if v is not None else None for v in node.inputs]

        def compute() -> ir.TensorProtocol:
            computed = _evaluate_proto(proto, names, tensors)
            if computed is None:
                raise ValueError(f"constant {proto.output[0]!r} cannot be computed")
            return computed

    return ir.LazyTensor(compute, dtype=result.dtype, shape=result.shape, name=result.name)


def _evaluate(node: ir.Node, tensors: Sequence[ir.TensorProtocol | None]) -> ir.Tensor[Any] | None:
    names = [v.name if v is not None else None for v in node.inputs]
    return _evaluate_proto(ir.serde.serialize_node(node), names, tensors)


def _evaluate_proto(
    proto: onnx.NodeProto,
    names: Sequence[str | None],
    tensors: Sequence[ir.TensorProtocol | None],
) -> ir.Tensor[Any] | None:
    """Run one node with the reference; None when the reference cannot."""
    inputs = dict(zip(names, tensors, strict=True))
    feeds = {n: t.numpy() for n, t in inputs.items() if n is not None and t is not None}
    infos = [
        onnx.helper.make_tensor_value_info(n, t.dtype.value, list(static_shape(t)))
        for n, t in inputs.items()
        if n is not None and t is not None
    ]
    made = onnx.helper.make_empty_tensor_value_info(proto.output[0])
    model = onnx.helper.make_model(
        onnx.helper.make_graph([proto], "fold", infos, [made]),
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    try:
        (computed,) = ReferenceEvaluator(model).run(None, feeds)
    except Exception:  # noqa: BLE001 - an op or a dtype that the reference lacks: leave the node as it is
        return None
    if computed is None or isinstance(computed, list):
        return None
    result = ir.tensor(np.asarray(computed))
    return result if isinstance(result, ir.Tensor) else None


# --- shape computations ------------------------------------------------------------------------


def _fold_shapes(graph: Graph) -> int:
    shapes = analyse(graph)
    edit, changed = Editor(graph), 0
    for node in list(graph.nodes()):
        if node.graph is None or node.domain not in ("", "ai.onnx"):
            continue
        edit.at(node)
        changed += _known_elements(edit, node, shapes) or _shorter(edit, node, shapes)
    return changed


def _known_elements(edit: Editor, node: ir.Node, shapes: Shapes) -> int:
    """Replace an integer result whose elements are all numbers."""
    result = node.outputs[0]
    elements = shapes.elements.get(result)
    if elements is None or result.is_graph_output() or not result.uses():
        return 0
    numbers = known(elements)
    if numbers is None:
        return 0
    dtype = (result.dtype or ir.DataType.INT64).numpy()
    constant = edit.constant(np.array(numbers, dtype=dtype).reshape(elements.shape), "shape")
    edit.replace(result, constant)
    return 1


def _shorter(edit: Editor, node: ir.Node, shapes: Shapes) -> int:
    if node.op_type == "Reshape":
        return _constant_reshape(edit, node, shapes)
    if node.op_type == "CastLike":
        like = node.inputs[1]
        if like is None or like.dtype is None or node.outputs[0].is_graph_output():
            return 0
        cast = edit.op("Cast", [node.inputs[0]], {"to": like.dtype.value}, like=node.outputs[0])
        edit.replace(node.outputs[0], cast)
        return 1
    return 0


def _constant_reshape(edit: Editor, node: ir.Node, shapes: Shapes) -> int:
    """Say a computed reshape target with constants: 0 keeps an extent, -1 is what is left."""
    data, target = node.inputs[0], node.inputs[1]
    if data is None or target is None or ints(target) is not None:
        return 0
    wanted, given = shapes.elements.get(target), shapes.shape.get(data)
    if wanted is None or given is None:
        return 0
    made = shapes.shape.get(node.outputs[0], ())
    written: list[int] = []
    for axis, extent in enumerate(wanted.reshape(-1)):
        # a -1 in the target may be a number that inference has found
        if extent == -1 and axis < len(made) and made[axis].is_Integer:
            extent = made[axis]
        if extent.is_Integer:
            written.append(int(extent))
        elif axis < len(given) and given[axis] == extent:
            written.append(0)
        else:
            written.append(-1)
    literal_zero = any(e == 0 for e in wanted.reshape(-1))
    if literal_zero or written.count(-1) > 1:
        return 0
    constant = edit.constant(np.array(written, dtype=np.int64), "shape")
    node.replace_input_with(1, constant)
    node.attributes.pop("allowzero", None)
    return 1
