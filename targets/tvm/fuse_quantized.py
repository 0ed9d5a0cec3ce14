"""Products with quantized weights become ops that have kernels, with the weights packed for them.

``MatMul([RoundActivations](x), Transpose(DequantizeLinear(codes, scale, zero)))`` with constant
codes turns into ``hal.tvm::QuantizedMatMul(x, packed)``, with a matrix for each head into
``hal.tvm::QuantizedHeadMatMul``, and ``Gather`` of such a table into ``hal.tvm::QuantizedGather``,
which reads the codes as the bundle stores them; a mixture of experts with such weights becomes
``hal.tvm::QuantizedMixtureOfExperts``. What fits none of them stays as it is. The packed bytes are
made when the build writes its weights, one tensor at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator

import numpy as np
import onnx_ir as ir

from hal.ir import HAL_DOMAIN, Graph
from hal.ir.small_floats import restate_small_floats
from hal.ir.weights import as_bytes
from hal.kernels.quantized_layout import Layout, pack
from hal.kernels.quantized_matmul import tiles_side_by_side
from hal.targets.tvm.lowering import Shaping
from hal.targets.tvm.own_ops import DOMAIN
from hal.targets.tvm.quantized_codes import (
    Codes,
    attribute,
    dequantized,
    heads_of,
    stacked,
    tensor_of,
    weights_of,
)

MATMUL = "QuantizedMatMul"
HEADS = "QuantizedHeadMatMul"
GATHER = "QuantizedGather"
EXPERTS = "QuantizedMixtureOfExperts"

_D = ir.DataType
_LARGEST_SUM = 1 << 31


def fuse_quantized(graph: Graph, shaping: Shaping) -> None:
    """Rewrite ``graph`` in place."""
    rewrite = _Rewrite(graph, shaping)
    for node in list(graph.graph):
        if node.op_type in ("MatMul", "Gemm", "Gather") and node.domain in ("", "ai.onnx"):
            rewrite.visit(node)
        elif (node.domain, node.op_type) == (HAL_DOMAIN, "MixtureOfExperts"):
            rewrite.experts(node)
    rewrite.finish()
    restate_small_floats(graph.graph)


@dataclasses.dataclass(frozen=True)
class _Product:
    """A product that has a kernel: the node, the activations before rounding, the weights."""

    node: ir.Node
    source: ir.Value
    weights: Codes
    layout: Layout
    block: int
    bits: int

    @property
    def key(self) -> Hashable:
        """Products with the same key can be one, with the rows of their weights stacked."""
        return self.source, self.block, self.bits, dataclasses.replace(self.layout, n=0)

    @property
    def stackable(self) -> bool:
        """Whether columns of another product can follow."""
        return self.layout.n % self.layout.columns == 0 and self.node.op_type == "MatMul"


class _Rewrite:
    """The rewrite of one graph; packed weights are shared by the nodes that read them."""

    def __init__(self, graph: Graph, shaping: Shaping) -> None:
        self._graph, self._shaping = graph, shaping
        self._products: list[_Product] = []
        self._packed: dict[Hashable, ir.Value] = {}
        self._raw: dict[ir.Value, ir.Value] = {}
        self._left: list[ir.Value] = []

    def visit(self, node: ir.Node) -> None:
        if node.op_type == "Gather":
            self._gather(node)
        else:
            self._product(node)

    def finish(self) -> None:
        groups: dict[Hashable, list[_Product]] = {}
        for product in self._products:
            key = product.key if product.stackable else product.node
            groups.setdefault(key, []).append(product)
        for products in groups.values():
            self._emit(products)
        if self._left:
            self._graph.graph.opset_imports[DOMAIN] = 1
        for value in self._left:
            _remove_unused(value)

    # -- products -----------------------------------------------------------------------------

    def _product(self, node: ir.Node) -> None:
        x, w = node.inputs[0], node.inputs[1]
        x = self._picked_first(x) if x is not None else None
        if x is None or w is None or x.shape is None or x.dtype is not _D.FLOAT or not len(x.shape):
            return
        if (found := heads_of(w)) is not None and node.op_type == "MatMul":
            self._by_heads(node, x, *found)
            return
        turned = node.op_type == "Gemm" and attribute(node, "transB", 0) == 1
        weights = weights_of(w, turned)
        if weights is None or not _plain_gemm(node):
            return
        block, bits = _rounding(x)
        layout = self._layout(weights, block)
        source = x.producer().inputs[0] if block else x  # type: ignore[union-attr]
        if layout is None or source is None:
            return
        self._products.append(_Product(node, source, weights, layout, block, bits))

    def _by_heads(self, node: ir.Node, x: ir.Value, weights: Codes, heads: int) -> None:
        """A product with a matrix for each head of ``x [.., heads, M, k]``."""
        if x.shape is None or len(x.shape) < 3 or x.shape[-3] != heads:
            return
        block, bits = _rounding(x)
        one = dataclasses.replace(weights, n=weights.n // heads)
        layout = self._layout(one, block)
        source = x.producer().inputs[0] if block else x  # type: ignore[union-attr]
        if layout is None or source is None:
            return
        fused = ir.Node(
            DOMAIN,
            HEADS,
            [source, self._pack_stacked(weights, layout, heads)],
            [
                *_attributes(layout),
                ir.AttrInt64("heads", heads),
                ir.AttrInt64("block", block),
                ir.AttrInt64("round_bits", bits),
            ],
            name=node.name,
        )
        self._replace(node, fused, [v for v in node.inputs if v is not None])

    def _picked_first(self, x: ir.Value) -> ir.Value:
        """Rows that are rounded and then picked are picked first: each is rounded by itself."""
        pick = x.producer()
        if pick is None or pick.op_type != "GatherND" or len(x.consumers()) != 1:
            return x
        data, places = pick.inputs
        rounding = data.producer() if data is not None else None
        if data is None or places is None or rounding is None or _rounding(data)[0] == 0:
            return x
        depth = places.shape[-1] if places.shape is not None else None
        rank = len(data.shape) if data.shape is not None else 0
        if not isinstance(depth, int) or attribute(pick, "batch_dims", 0) + depth >= rank:
            return x
        pick.replace_input_with(0, rounding.inputs[0])
        again = ir.Node(HAL_DOMAIN, "RoundActivations", [x], list(rounding.attributes.values()))
        result = again.outputs[0]
        result.name, result.type, result.shape = f"{x.name}.rounded", *_type(x)
        self._graph.graph.insert_after(pick, again)
        x.replace_all_uses_with(result)
        again.replace_input_with(0, x)
        self._left.append(data)
        return result

    def _layout(self, weights: Codes, block: int) -> Layout | None:
        """The layout for activations rounded in blocks of ``block`` (0: not rounded)."""
        group = weights.group
        if block and block % group:
            if group % block:
                return None
            group = block
        dot = self._shaping.dot if block else None
        integer = dot is not None and group * 127 * 255 < _LARGEST_SUM
        integer = integer and not (weights.floats and weights.bits == 8)
        return Layout(
            weights.n,
            weights.k,
            weights.bits,
            group,
            dot.lanes if dot is not None and integer else self._shaping.lanes,
            zeros=not weights.symmetric,
            integer=integer,
            signed=dot is not None and integer and dot.signed,
            tiles=tiles_side_by_side(self._shaping.registers) if integer else 1,
            floats=weights.floats,
        )

    def _emit(self, products: list[_Product]) -> None:
        """One op for products of the same activations, at the place of the first."""
        first = products[0]
        layout = dataclasses.replace(first.layout, n=sum(p.layout.n for p in products))
        fused = ir.Node(
            DOMAIN,
            MATMUL,
            [first.source, self._pack(products, layout)],
            [
                *_attributes(layout),
                ir.AttrInt64("block", first.block),
                ir.AttrInt64("round_bits", first.bits),
            ],
            name=first.node.name,
        )
        sources = [[v for v in p.node.inputs[:2] if v is not None] for p in products]
        if len(products) == 1:
            self._replace(first.node, fused, sources[0])
            return
        whole, old = fused.outputs[0], first.node.outputs[0]
        whole.name, whole.type = f"{old.name}.together", old.type
        if old.shape is not None:
            whole.shape = ir.Shape([*old.shape[:-1], layout.n])
        self._graph.graph.insert_before(first.node, fused)
        sizes = np.array([p.layout.n for p in products], np.int64)
        name = f"{whole.name}.sizes"
        parts = ir.Node(
            "",
            "Split",
            [whole, self._initializer(ir.Tensor(sizes, name=name), name)],
            [ir.AttrInt64("axis", -1)],
            num_outputs=len(products),
        )
        self._graph.graph.insert_before(first.node, parts)
        for product, part, left in zip(products, parts.outputs, sources, strict=True):
            self._take_over(product.node, part)
            self._left.extend(left)

    def _pack(self, products: list[_Product], layout: Layout) -> ir.Value:
        key = (layout, *((p.weights.codes, p.weights.scale) for p in products))
        if key not in self._packed:
            parts = [(p.weights, p.layout) for p in products]
            name = f"{products[0].weights.codes.name}.packed"
            if self._packed:
                name += str(len(self._packed))
            tensor = ir.LazyTensor(
                lambda: ir.Tensor(np.concatenate([_packed(w, own) for w, own in parts])),
                dtype=_D.UINT8,
                shape=ir.Shape([layout.bytes]),
                name=name,
            )
            self._packed[key] = self._initializer(tensor, name)
        return self._packed[key]

    # -- experts ------------------------------------------------------------------------------

    def experts(self, node: ir.Node) -> None:
        """A mixture of experts both of whose weights are codes."""
        up, down = (stacked(value) if value is not None else None for value in node.inputs[3:5])
        x = node.inputs[0]
        if up is None or down is None or x is None:
            return
        count = int(tensor_of(up.codes).shape.numpy()[0])
        block, bits = _rounding(x)
        layout = self._layout(dataclasses.replace(up, n=up.n // count), block)
        if layout is None:  # scales of activations go across those of weights
            block, layout = 0, self._layout(dataclasses.replace(up, n=up.n // count), 0)
        below = self._layout(dataclasses.replace(down, n=down.n // count), 0)
        source = x.producer().inputs[0] if block else x  # type: ignore[union-attr]
        assert layout is not None
        assert below is not None
        layouts = [layout, below]
        packed = [
            self._pack_stacked(codes, own, count)
            for codes, own in zip((up, down), layouts, strict=True)
        ]
        attributes = [
            ir.AttrInt64("experts", count),
            ir.AttrString("activation", str(attribute(node, "activation", "silu"))),
            ir.AttrInt64("block", block),
            ir.AttrInt64("round_bits", bits),
        ]
        for prefix, layout in zip(("up_", "down_"), layouts, strict=True):
            attributes += [ir.AttrInt64(prefix + a.name, a.as_int()) for a in _attributes(layout)]
        inputs = [source, *node.inputs[1:3], *packed]
        fused = ir.Node(DOMAIN, EXPERTS, inputs, attributes, name=node.name)
        self._replace(node, fused, [v for v in (x, *node.inputs[3:5]) if v is not None])

    def _pack_stacked(self, codes: Codes, layout: Layout, count: int) -> ir.Value:
        """The matrices of all experts or heads, each packed by itself, one after the other."""
        key = (layout, codes.codes, codes.scale)
        if key not in self._packed:
            name = f"{codes.codes.name}.packed"
            tensor = ir.LazyTensor(
                lambda: ir.Tensor(_packed_stacked(codes, layout, count)),
                dtype=_D.UINT8,
                shape=ir.Shape([count * layout.bytes]),
                name=name,
            )
            self._packed[key] = self._initializer(tensor, name)
        return self._packed[key]

    # -- tables -------------------------------------------------------------------------------

    def _gather(self, node: ir.Node) -> None:
        table, ids = node.inputs[0], node.inputs[1]
        if table is None or ids is None or ids.shape is None or attribute(node, "axis", 0) != 0:
            return
        codes = dequantized(table)
        if codes is None or codes.flipped or codes.k * codes.bits % 8:
            return
        fused = ir.Node(
            DOMAIN,
            GATHER,
            [ids, self._bytes(codes), self._scale(codes), *([codes.zero] if codes.zero else [])],
            [
                ir.AttrInt64("k", codes.k),
                ir.AttrInt64("bits", codes.bits),
                ir.AttrInt64("group", codes.group),
                ir.AttrInt64("signed", int(codes.stored_signed)),
                ir.AttrInt64("floats", int(codes.floats)),
            ],
            name=node.name,
        )
        self._replace(node, fused, [table])

    def _scale(self, codes: Codes) -> ir.Value:
        """The scales, as numbers where they are stored as something else."""
        if not codes.floats or codes.bits == 8:
            return codes.scale
        if codes.scale not in self._raw:
            name = f"{codes.scale.name}.numbers"
            numbers = ir.Tensor(codes.scale_numbers, name=name)
            self._raw[codes.scale] = self._initializer(numbers, name)
        return self._raw[codes.scale]

    def _bytes(self, codes: Codes) -> ir.Value:
        """The codes as the bytes that hold them, ``uint8 [n, bytes of a row]``."""
        if codes.codes not in self._raw:
            tensor = tensor_of(codes.codes)
            shape = ir.Shape([codes.n, codes.k * codes.bits // 8])
            name = f"{codes.codes.name}.bytes"
            raw = as_bytes(tensor, shape, name)
            self._raw[codes.codes] = self._initializer(raw, name)
        return self._raw[codes.codes]

    # -- the graph ----------------------------------------------------------------------------

    def _initializer(self, tensor: ir.TensorProtocol, name: str) -> ir.Value:
        value = ir.Value(name=name, const_value=tensor)
        value.shape, value.type = tensor.shape, ir.TensorType(tensor.dtype)  # type: ignore[assignment]
        self._graph.graph.register_initializer(value)
        return value

    def _replace(self, node: ir.Node, fused: ir.Node, sources: list[ir.Value]) -> None:
        """Put ``fused`` in the place of ``node``, whose output keeps its name and type."""
        new, graph = fused.outputs[0], self._graph.graph
        new.name, new.type, new.shape = node.outputs[0].name, *_type(node.outputs[0])
        graph.insert_before(node, fused)
        bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
        if bias is not None:
            added = ir.Node("", "Add", [new, bias])
            graph.insert_before(node, added)
            new.name = f"{new.name}.product"
            new = added.outputs[0]
        self._take_over(node, new)
        self._left.extend(sources)

    def _take_over(self, node: ir.Node, new: ir.Value) -> None:
        """``new`` becomes what the output of ``node`` was, and the node goes."""
        old = node.outputs[0]
        new.name, new.type, new.shape = old.name, *_type(old)
        old.name = f"{old.name}.replaced"
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        self._graph.graph.remove(node, safe=True)


def _type(value: ir.Value) -> tuple[ir.TypeProtocol | None, ir.Shape | None]:
    return value.type, value.shape


def _packed(weights: Codes, layout: Layout) -> np.ndarray:
    zeros, scales = weights.zeros(layout.group), weights.scales(layout.group)
    return pack(layout, weights.matrix(), scales, zeros)


def _packed_stacked(weights: Codes, layout: Layout, count: int) -> np.ndarray:
    matrix, scales, zeros = (
        weights.matrix(),
        weights.scales(layout.group),
        weights.zeros(layout.group),
    )
    parts = []
    for first in range(0, count * layout.n, layout.n):
        rows = slice(first, first + layout.n)
        own = None if zeros is None else zeros[rows]
        parts.append(pack(layout, matrix[rows], scales[rows], own))
    return np.concatenate(parts)


def _rounding(x: ir.Value) -> tuple[int, int]:
    """Block and bits of the ``RoundActivations`` that makes ``x``; a block of 0 for none."""
    node = x.producer()
    if node is None or (node.domain, node.op_type) != (HAL_DOMAIN, "RoundActivations"):
        return 0, 8
    source, last = node.inputs[0], x.shape[-1] if x.shape is not None else None
    bits, block = attribute(node, "bits", 8), attribute(node, "block_size", 0)
    if source is None or source.dtype is not _D.FLOAT or not isinstance(last, int):
        return 0, 8
    return (block or last, bits) if 2 <= bits <= 8 else (0, 8)


def _plain_gemm(node: ir.Node) -> bool:
    """Whether a node is a product and a sum without factors (any ``MatMul`` is)."""
    factors = (attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0))
    return factors == (1.0, 1.0) and not attribute(node, "transA", 0)


def _attributes(layout: Layout) -> Iterator[ir.Attr]:
    for field in dataclasses.fields(Layout):
        yield ir.AttrInt64(field.name, int(getattr(layout, field.name)))


def _remove_unused(value: ir.Value) -> None:
    """Remove the node that makes ``value``, and what it alone used, if nobody reads it now."""
    node = value.producer()
    if node is None or node.graph is None:
        return
    if any(output.uses() or output.is_graph_output() for output in node.outputs):
        return
    sources = [v for v in node.inputs if v is not None]
    node.graph.remove(node, safe=True)
    for source in sources:
        _remove_unused(source)
