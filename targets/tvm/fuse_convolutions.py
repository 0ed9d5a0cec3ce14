"""Convolutions with constant weights become ops that have a kernel, with the weights packed for it.

``Conv`` and what follows it alone (the sum with a tensor of the same shape, then ``Relu`` or
``Clip``) turns into ``hal.tvm::Convolution(x, packed, bias[, residual])``. Maps have one or two
axes of known sizes; what fits no kernel stays as it is. The packed weights are made when the build
writes its weights, one tensor at a time; codes become floats then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from hal.ir import Graph
from hal.kernels import convolution_plan, winograd
from hal.kernels.convolution_plan import Geometry, Plan
from hal.kernels.winograd import Tiles
from hal.targets.tvm.lowering import Shaping
from hal.targets.tvm.own_ops import CONVOLUTION, DOMAIN, EXPANDED
from hal.targets.tvm.quantized_codes import attribute

_FLOAT = ir.DataType.FLOAT


def fuse_convolutions(graph: Graph, shaping: Shaping) -> None:
    """Rewrite ``graph`` in place."""
    for node in list(graph.graph):
        if node.op_type == "Conv" and not node.domain:
            _fuse(graph, node, shaping)


def geometry_of(node: ir.Node, x: ir.Value, weights: ir.Value) -> Geometry | None:
    """The sizes of a ``Conv``, one axis counting as a map of one row; None if any is unknown."""
    if x.shape is None or weights.shape is None or not 3 <= len(x.shape) <= 4:
        return None
    sizes, shape = list(x.shape)[1:], list(weights.shape)
    if not all(isinstance(d, int) for d in (*sizes, *shape)):
        return None
    channels, *spatial = [int(d) for d in sizes]  # type: ignore[arg-type]
    outputs, _, *window = [int(d) for d in shape]  # type: ignore[arg-type]
    rank = len(spatial)
    strides = list(attribute(node, "strides", None) or [1] * rank)
    dilations = list(attribute(node, "dilations", None) or [1] * rank)
    pads = list(attribute(node, "pads", None) or [0] * (2 * rank))
    auto = attribute(node, "auto_pad", "NOTSET")
    if auto == "VALID":
        pads = [0] * (2 * rank)
    elif auto != "NOTSET":
        pads = _same(spatial, window, strides, dilations, upper=auto == "SAME_UPPER")
    if rank == 1:
        spatial, window = [1, *spatial], [1, *window]
        strides, dilations, pads = [1, *strides], [1, *dilations], [0, pads[0], 0, pads[1]]
    return Geometry(
        channels,
        outputs,
        int(attribute(node, "group", 1)),
        (spatial[0], spatial[1]),
        (window[0], window[1]),
        (strides[0], strides[1]),
        (dilations[0], dilations[1]),
        (pads[0], pads[1], pads[2], pads[3]),
    )


def plan(geometry: Geometry, shaping: Shaping, *, codes: bool = False) -> Plan | Tiles | None:
    """How kernels compute it on this chip, in tiles where that takes less; None: they cannot.

    Of weights that were ``codes`` the sums are plain: results are rounded to codes again, and the
    larger errors of tiles would move more of them to the next one.
    """
    lanes, registers = shaping.lanes, shaping.registers
    tiles = None if codes else winograd.plan(geometry, lanes, registers)
    return tiles or convolution_plan.plan(geometry, lanes, registers)


def plan_of(node: ir.Node, shaping: Shaping) -> Plan | Tiles:
    """The plan of a ``hal.tvm::Convolution``: what it was fused by."""
    values = {f.name: node.attributes[f.name].value for f in dataclasses.fields(Geometry)}
    sizes: dict[str, Any] = {n: v if isinstance(v, int) else tuple(v) for n, v in values.items()}
    codes = bool(node.attributes[EXPANDED].as_int())
    made = plan(Geometry(**sizes), shaping, codes=codes)
    assert made is not None
    return made


def _same(
    spatial: list[int], window: list[int], strides: list[int], dilations: list[int], *, upper: bool
) -> list[int]:
    sizes = zip(spatial, window, strides, dilations, strict=True)
    amounts = [max(0, (-(-n // s) - 1) * s + (k - 1) * d + 1 - n) for n, k, s, d in sizes]
    small, large = [a // 2 for a in amounts], [a - a // 2 for a in amounts]
    return [*small, *large] if upper else [*large, *small]


def _fuse(graph: Graph, node: ir.Node, shaping: Shaping) -> None:
    x, weights = node.inputs[0], node.inputs[1]
    if x is None or weights is None or x.dtype is not _FLOAT:
        return
    sizes, read = geometry_of(node, x, weights), _reader(weights)
    if read is None or weights.dtype is not _FLOAT or sizes is None:
        return
    codes = weights.const_value is None
    made = plan(sizes, shaping, codes=codes)
    if made is None:
        return
    chain = _Chain(node)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        name = f"{weights.name}.no_bias"
        bias = initializer(graph, ir.Tensor(np.zeros(sizes.outputs, np.float32), name=name), name)
    fused = ir.Node(
        DOMAIN,
        CONVOLUTION,
        [x, _packed(graph, read, f"{weights.name}.packed", made), bias, *chain.residual],
        [
            *attributes(dataclasses.asdict(sizes)),
            *attributes(chain.limits),
            ir.AttrInt64(EXPANDED, int(codes)),
        ],
        name=node.name,
    )
    old, new = chain.last.outputs[0], fused.outputs[0]
    graph.graph.insert_before(chain.last, fused)
    new.name, new.type, new.shape = old.name, old.type, old.shape
    old.name = f"{old.name}.replaced"
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    for gone in reversed(chain.nodes):
        graph.graph.remove(gone, safe=True)
    maker = weights.producer()
    if maker is not None and not weights.uses() and not weights.is_graph_output():
        graph.graph.remove(maker, safe=True)
    graph.graph.opset_imports[DOMAIN] = 1


class _Chain:
    """A convolution and what of its successors the kernel does before it stores a result."""

    def __init__(self, node: ir.Node) -> None:
        self.nodes, self.residual = [node], []  # type: tuple[list[ir.Node], list[ir.Value]]
        self.limits: dict[str, float] = {}
        after = self._next()
        if after is not None and after.op_type == "Add" and (other := self._other(after)):
            self.residual = [other]
            self.nodes.append(after)
            after = self._next()
        limits = limits_of(after) if after is not None else None
        if after is not None and limits is not None:
            self.nodes.append(after)
            self.limits = limits

    @property
    def last(self) -> ir.Node:
        """Whose place the fused op takes."""
        return self.nodes[-1]

    def _next(self) -> ir.Node | None:
        """The only reader of what is there so far."""
        node = only_reader(self.last.outputs[0], self.last)
        return node if node is not None and not node.domain else None

    def _other(self, node: ir.Node) -> ir.Value | None:
        """What is added, if it has the same shape."""
        own = self.last.outputs[0]
        first, second = node.inputs
        other = second if first is own else first
        if other is None or other is own or other.dtype is not _FLOAT or other.shape is None:
            return None
        return other if own.shape is not None and other.shape == own.shape else None


def only_reader(value: ir.Value, maker: ir.Node) -> ir.Node | None:
    """The node that reads ``value``, if there is one only and it is no result of the graph."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output() or uses[0].node.graph is not maker.graph:
        return None
    return uses[0].node


def limits_of(node: ir.Node) -> dict[str, float] | None:
    """Bounds of ``Relu``, or of ``Clip`` with constant ones."""
    if node.op_type == "Relu":
        return {"low": 0.0}
    if node.op_type != "Clip":
        return None
    limits = {}
    for name, value in zip(("low", "high"), node.inputs[1:], strict=False):
        if value is None:
            continue
        if value.const_value is None or value.is_graph_input():
            return None
        limits[name] = float(value.const_value.numpy())
    return limits


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The values of a constant, be it floats or codes that are dequantized; None if it is none."""
    read = _reader(value) if value is not None else None
    return read() if read else None


def _reader(weights: ir.Value) -> Callable[[], np.ndarray] | None:
    """What gives the values of constant weights, be they floats or codes; None if they are not."""
    tensor, node = weights.const_value, weights.producer()
    if tensor is not None:
        return None if weights.is_graph_input() else tensor.numpy
    if node is None or node.op_type != "DequantizeLinear" or node.domain:
        return None
    if any(v is None or v.const_value is None or v.is_graph_input() for v in node.inputs):
        return None
    parts = [v.const_value for v in node.inputs if v is not None and v.const_value is not None]
    axis, block = attribute(node, "axis", 1), attribute(node, "block_size", 0)

    def dequantized() -> np.ndarray:
        codes, *others = (part.numpy().astype(np.float32) for part in parts)
        scale, zero = (
            _aligned(part, codes.shape, axis, block) for part in (*others, 0 * others[0])[:2]
        )
        return ((codes - zero) * scale).astype(np.float32)

    return dequantized


def _aligned(part: np.ndarray, shape: tuple[int, ...], axis: int, block: int) -> np.ndarray:
    """Scales or zero points, by tensor, axis or block, so that they broadcast over the codes."""
    if block:
        return np.repeat(part, block, axis).take(np.arange(shape[axis]), axis)
    return part.reshape([-1 if a == axis % len(shape) else 1 for a in range(len(shape))])


def _packed(
    graph: Graph, read: Callable[[], np.ndarray], name: str, made: Plan | Tiles
) -> ir.Value:
    """The weights as the kernel reads them."""

    def pack() -> ir.TensorProtocol:
        array = read()
        if isinstance(made, Tiles):
            return ir.Tensor(winograd.pack(array, made))
        return ir.Tensor(convolution_plan.pack(array, made))

    shape = made.products.packed_shape if isinstance(made, Tiles) else made.packed_shape
    lazy = ir.LazyTensor(pack, dtype=_FLOAT, shape=ir.Shape(shape), name=name)
    return initializer(graph, lazy, name)


def initializer(graph: Graph, tensor: ir.TensorProtocol, name: str) -> ir.Value:
    """A constant of the graph."""
    if name in graph.graph.initializers:
        name = f"{name}.{len(graph.graph.initializers)}"
    value = ir.Value(name=name, const_value=tensor)
    value.shape, value.type = tensor.shape, ir.TensorType(tensor.dtype)  # type: ignore[assignment]
    graph.graph.register_initializer(value)
    return value


def attributes(values: Mapping[str, Any]) -> list[ir.Attr]:
    """Numbers and tuples of whole numbers as attributes."""
    made: list[ir.Attr] = []
    for name, value in values.items():
        if isinstance(value, tuple):
            made.append(ir.AttrInt64s(name, value))
        elif isinstance(value, float):
            made.append(ir.AttrFloat32(name, value))
        else:
            made.append(ir.AttrInt64(name, value))
    return made
