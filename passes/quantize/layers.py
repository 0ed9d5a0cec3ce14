"""Which weights of a graph can be quantized, what they are called and what they do."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from hal.errors import did_you_mean
from hal.ir import HAL_DOMAIN, Graph
from hal.passes._edit import SCOPE_KEY, is_constant, is_op

CONVOLUTIONS = ("Conv", "ConvTranspose")

SMALLEST = 4096
"""Matrices with fewer elements are left alone: there is nothing to gain."""

_ELEMENTWISE = (
    "Add", "Cast", "Clip", "Div", "Exp", "Identity", "Max", "Min", "Mul", "Neg", "Reshape",
    "Sigmoid", "Softmax", "Softplus", "Squeeze", "Sub", "Tanh", "Unsqueeze",
)  # fmt: skip
_CHOOSERS = ("TopK", "ArgMax", "ArgMin")
_ALONE = {"in, out", "conv", "transposed conv"}
"""Ways to read a weight that go with no other way."""

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One weight that a product, a look-up, a convolution or a mixture of experts reads.

    Attributes:
        name: the module of the source that the weight belongs to; unique in the graph.
        kind: ``linear``, ``head`` (its result is the model's), ``embedding``, ``conv`` or
            ``experts``; a weight that is embedding and head at once is a ``head``.
        weight: the initializer.
        across: True where it is stored ``[.., in, out]``; False for ``[.., out, in]``. A
            convolution's is stored ``[out, in, *kernel]``, a transposed one's
            ``[in, out, *kernel]`` (across).
        uses: nodes that read it: ``MatMul``, ``Gather``, ``MixtureOfExperts``, ``Transpose`` or a
            convolution.
        routes: its result decides which of several things is computed.
    """

    name: str
    kind: str
    weight: ir.Value
    across: bool
    uses: tuple[ir.Node, ...]
    routes: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's extents as ``[.., out, in]``; a convolution's as they are stored."""
        assert self.weight.const_value is not None
        extents = tuple(int(d) for d in self.weight.const_value.shape.numpy())
        if self.across and self.kind != "conv":
            return (*extents[:-2], extents[-1], extents[-2])
        return extents

    @property
    def stacked(self) -> bool:
        """Whether the weight is a matrix for each head: ``x [.., heads, M, in]`` times each its."""
        return self.kind != "conv" and self.kind != "experts" and len(self.shape) == 3

    @property
    def size(self) -> int:
        """Number of weights."""
        assert self.weight.const_value is not None
        return int(self.weight.const_value.size)

    def matrix(self, array: np.ndarray) -> np.ndarray:
        """The weight's array, as it is stored, as a matrix ``[rows, in]``: one row an output."""
        if self.kind == "conv":
            rows = np.moveaxis(array, 1, 0) if self.across else array
            return rows.reshape(len(rows), -1)
        rows = np.swapaxes(array, -1, -2) if self.across else array
        return rows.reshape(-1, rows.shape[-1])

    def stored(self, matrix: np.ndarray) -> np.ndarray:
        """The inverse of :meth:`matrix`, contiguous."""
        if not self.across:
            return np.ascontiguousarray(matrix).reshape(self.shape)
        if self.kind == "conv":
            first, rows, *kernel = self.shape
            return np.ascontiguousarray(np.moveaxis(matrix.reshape(rows, first, *kernel), 0, 1))
        return np.ascontiguousarray(np.swapaxes(matrix.reshape(self.shape), -1, -2))

    @property
    def products(self) -> tuple[ir.Node, ...]:
        """The ``MatMul`` nodes that the weight goes into, through a ``Transpose`` or not."""
        found = []
        for node in self.uses:
            found += _readers(node.outputs[0]) if is_op(node, "Transpose") else [node]
        return tuple(n for n in found if is_op(n, "MatMul"))


def find_layers(graph: Graph) -> list[Layer]:
    """Every weight that can be quantized, in the order in which the graph uses them."""
    order = {node: i for i, node in enumerate(graph.nodes())}
    found = []
    for value in graph.graph.initializers.values():
        layer = _layer(value)
        if layer is not None and (layer.size >= SMALLEST or layer.kind == "conv"):
            found.append(layer)
    found.sort(key=lambda layer: min(order[n] for n in layer.products or layer.uses))
    names: dict[str, int] = {}
    result = []
    for layer in found:
        count = names[layer.name] = names.get(layer.name, 0) + 1
        result.append(
            layer if count == 1 else dataclasses.replace(layer, name=f"{layer.name}.{count}")
        )
    return result


def unknown_layer(name: str, layers: list[Layer]) -> str:
    """A hint for a name that is no layer's."""
    return did_you_mean(name, [layer.name for layer in layers])


def _layer(value: ir.Value) -> Layer | None:
    tensor = value.const_value
    if not is_constant(value) or tensor is None or tensor.dtype not in _FLOATS:
        return None
    if value.is_graph_output() or not value.uses():
        return None
    uses = tuple(dict.fromkeys(use.node for use in value.uses()))
    roles = {_role(node, value) for node in uses}
    if None in roles or (roles & _ALONE and len(roles) > 1):
        return None
    products = [n for node in uses for n in _products(node)]
    heads = [n for n in products if _reaches_output(n.outputs[0])]
    if "experts" in roles:
        kind = "experts"
    elif roles & {"conv", "transposed conv"}:
        kind = "conv"
    elif heads:
        kind = "head"
    else:
        kind = "linear" if products else "embedding"
    return Layer(
        _name(value, heads or products or list(uses), kind),
        kind,
        value,
        bool(roles & {"in, out", "transposed conv"}),
        uses,
        any(_reaches_choice(n.outputs[0]) for n in products),
    )


def _role(node: ir.Node, value: ir.Value) -> str | None:
    """How a node reads a weight; None for a use that does not allow for quantization."""
    if node.domain == HAL_DOMAIN and node.op_type == "MixtureOfExperts":
        return "experts" if value in node.inputs[3:5] else None
    if is_op(node, *CONVOLUTIONS):
        inputs = [i for i, v in enumerate(node.inputs) if v is value]
        alone = inputs == [1] and not is_constant(node.inputs[0])
        if not alone:
            return None
        return "conv" if node.op_type == "Conv" else "transposed conv"
    rank = len(value.shape) if value.shape is not None else 0
    if rank == 3 and is_op(node, "MatMul") and node.inputs[1] is value:
        return "in, out" if _by_heads(node, value) else None
    if rank != 2:
        return None
    if is_op(node, "MatMul") and node.inputs[1] is value and not is_constant(node.inputs[0]):
        return "in, out"
    if is_op(node, "Gather") and node.inputs[0] is value:
        axis = node.attributes.get_int("axis", 0)
        return "rows" if axis in (0, -2) else None
    if is_op(node, "Transpose") and list(node.attributes.get_ints("perm", [1, 0])) == [1, 0]:
        readers = _readers(node.outputs[0])
        fits = all(
            is_op(n, "MatMul") and n.inputs[1] is node.outputs[0] and not is_constant(n.inputs[0])
            for n in readers
        )
        return "out, in" if readers and fits and not node.outputs[0].is_graph_output() else None
    return None


def _by_heads(node: ir.Node, value: ir.Value) -> bool:
    """Whether a product has a matrix of ``value`` for each head of its input, none for several."""
    x = node.inputs[0]
    if x is None or is_constant(x) or x.shape is None or value.shape is None or len(x.shape) < 3:
        return False
    heads = value.shape[0]
    return isinstance(heads, int) and x.shape[-3] == heads


def _products(node: ir.Node) -> list[ir.Node]:
    if is_op(node, "Transpose"):
        return _readers(node.outputs[0])
    return [node] if is_op(node, "MatMul") else []


def _readers(value: ir.Value) -> list[ir.Node]:
    return list(dict.fromkeys(use.node for use in value.uses()))


def _name(value: ir.Value, nodes: list[ir.Node], kind: str) -> str:
    scopes = [n.metadata_props.get(SCOPE_KEY, "") for n in nodes]
    own = (value.name or "").removesuffix(".transposed").removesuffix(".weight")
    if kind == "experts" or not scopes[0]:
        return own
    return scopes[0]


def _downstream(value: ir.Value) -> Iterator[ir.Value]:
    """Values that follow from ``value`` element by element, itself first."""
    seen, todo = {value}, [value]
    while todo:
        current = todo.pop()
        yield current
        for node in _readers(current):
            if is_op(node, *_ELEMENTWISE):
                new = [v for v in node.outputs if v not in seen]
                seen.update(new)
                todo += new


def _reaches_output(value: ir.Value) -> bool:
    """Whether the model's result is this one, elementwise steps aside, and nothing else uses it."""
    reached = list(_downstream(value))
    return any(v.is_graph_output() for v in reached) and all(
        is_op(node, *_ELEMENTWISE) for v in reached for node in _readers(v)
    )


def _reaches_choice(value: ir.Value) -> bool:
    return any(is_op(node, *_CHOOSERS) for v in _downstream(value) for node in _readers(v))


__all__ = ["CONVOLUTIONS", "SMALLEST", "Layer", "find_layers", "unknown_layer"]
