"""Products with quantized weights become ops that have kernels, with the weights packed for them.

``MatMul([RoundActivations](x), Transpose(DequantizeLinear(codes, scale, zero)))`` with constant
codes turns into ``hal.tvm::QuantizedMatMul(x, packed)``, and ``Gather`` of such a table into
``hal.tvm::QuantizedGather``, which reads the codes as the bundle stores them. What fits neither
stays as it is. The packed bytes are made when the build writes its weights, one tensor at a time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from hal.ir import HAL_DOMAIN, Graph
from hal.kernels.quantized_layout import Layout, pack
from hal.targets.tvm.lowering import Shaping

DOMAIN = "hal.tvm"
"""Domain of the ops that exist between this backend's own steps only."""

MATMUL = "QuantizedMatMul"
GATHER = "QuantizedGather"

_D = ir.DataType
_BITS = {_D.INT8: 8, _D.UINT8: 8, _D.INT4: 4, _D.UINT4: 4, _D.INT2: 2, _D.UINT2: 2}
_SIGNED = frozenset({_D.INT8, _D.INT4, _D.INT2})
_LARGEST_SUM = 1 << 31


@dataclasses.dataclass(frozen=True)
class Codes:
    """A constant ``DequantizeLinear`` of a matrix, seen as rows ``[n, k]``.

    ``flipped``: the tensors are stored ``[k, n]``. ``group``: weights along ``k`` for each scale.
    ``planes``: the codes are three bits each, stored as ``hal::UnpackBits`` takes them; ``signed``:
    it takes 4 from each.
    """

    codes: ir.Value
    scale: ir.Value
    zero: ir.Value | None
    n: int
    k: int
    bits: int
    group: int
    flipped: bool = False
    planes: bool = False
    signed: bool = False

    @property
    def symmetric(self) -> bool:
        """Whether zero is the middle of the range: signed codes, or unsigned ones around it."""
        if self.signed or self.codes_dtype in _SIGNED:
            return self.zero is None or not _array(self.zero).astype(np.int32).any()
        middle = 1 << (self.bits - 1)
        return self.zero is not None and bool((_array(self.zero).astype(np.int32) == middle).all())

    @property
    def codes_dtype(self) -> ir.DataType:
        """Dtype of the codes as stored."""
        return _tensor(self.codes).dtype

    def matrix(self) -> np.ndarray:
        """Codes ``[n, k]``: signed around zero if symmetric, unsigned otherwise."""
        stored = _array(self.codes)
        values = unpacked_planes(stored) if self.planes else stored
        return self._oriented(self._shifted(values))

    def scales(self, group: int) -> np.ndarray:
        """Scales ``[n, groups]`` for a group that divides this one."""
        return self._repeated(_array(self.scale), group)

    def zeros(self, group: int) -> np.ndarray | None:
        """Unsigned zero points ``[n, groups]``, or None if symmetric."""
        if self.symmetric:
            return None
        if self.zero is None:  # unsigned codes from zero up
            return np.zeros((self.n, -(-self.k // group)), np.uint8)
        return self._repeated(self._shifted(_array(self.zero)), group)

    def _shifted(self, values: np.ndarray) -> np.ndarray:
        middle = 1 << (self.bits - 1)
        if self.symmetric == (self.codes_dtype in _SIGNED):
            return values.astype(np.int8 if self.symmetric else np.uint8)
        wide = values.astype(np.int16)
        return (
            (wide - middle).astype(np.int8) if self.symmetric else (wide + middle).astype(np.uint8)
        )

    def _oriented(self, values: np.ndarray) -> np.ndarray:
        return values.T if self.flipped else values

    def _repeated(self, values: np.ndarray, group: int) -> np.ndarray:
        if values.ndim < 2:
            rows = np.broadcast_to(values.reshape(-1, 1), (self.n, 1))
        else:
            rows = self._oriented(values)
        return rows[:, np.arange(-(-self.k // group)) * group // self.group]


def unpacked_planes(packed: np.ndarray) -> np.ndarray:
    """Codes ``uint8 [n, k]`` of ``hal::UnpackBits`` input ``uint8 [n, k * 3 / 8]``."""
    middle = packed.shape[-1] // 3 * 2
    low = (packed[..., :middle, None] >> np.arange(0, 8, 2, dtype=np.uint8)) & 3
    high = (packed[..., middle:, None] >> np.arange(8, dtype=np.uint8)) & 1
    rows = packed.shape[:-1]
    return np.asarray(low.reshape(*rows, -1) | (high.reshape(*rows, -1) << 2), np.uint8)


def fuse_quantized(graph: Graph, shaping: Shaping) -> None:
    """Rewrite ``graph`` in place."""
    rewrite = _Rewrite(graph, shaping)
    for node in list(graph.graph):
        if node.op_type in ("MatMul", "Gemm", "Gather") and node.domain in ("", "ai.onnx"):
            rewrite.visit(node)
    rewrite.finish()


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
        turned = node.op_type == "Gemm" and _attribute(node, "transB", 0) == 1
        weights = _weights(w, turned)
        if weights is None or not _plain_gemm(node):
            return
        block, bits = _rounding(x)
        layout = self._layout(weights, block)
        source = x.producer().inputs[0] if block else x  # type: ignore[union-attr]
        if layout is None or source is None:
            return
        self._products.append(_Product(node, source, weights, layout, block, bits))

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
        if not isinstance(depth, int) or _attribute(pick, "batch_dims", 0) + depth >= rank:
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
        return Layout(
            weights.n,
            weights.k,
            weights.bits,
            group,
            dot.lanes if dot is not None and integer else self._shaping.lanes,
            zeros=not weights.symmetric,
            integer=integer,
            signed=dot is not None and integer and dot.signed,
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

    # -- tables -------------------------------------------------------------------------------

    def _gather(self, node: ir.Node) -> None:
        table, ids = node.inputs[0], node.inputs[1]
        if table is None or ids is None or ids.shape is None or _attribute(node, "axis", 0) != 0:
            return
        codes = _dequantized(table)
        if codes is None or codes.flipped or codes.k * codes.bits % 8:
            return
        fused = ir.Node(
            DOMAIN,
            GATHER,
            [ids, self._bytes(codes), codes.scale, *([codes.zero] if codes.zero else [])],
            [
                ir.AttrInt64("k", codes.k),
                ir.AttrInt64("bits", codes.bits),
                ir.AttrInt64("group", codes.group),
                ir.AttrInt64("signed", int(codes.signed or codes.codes_dtype in _SIGNED)),
            ],
            name=node.name,
        )
        self._replace(node, fused, [table])

    def _bytes(self, codes: Codes) -> ir.Value:
        """The codes as the bytes that hold them, ``uint8 [n, bytes of a row]``."""
        if codes.codes not in self._raw:
            tensor = _tensor(codes.codes)
            shape = ir.Shape([codes.n, codes.k * codes.bits // 8])
            name = f"{codes.codes.name}.bytes"
            raw: ir.TensorProtocol
            if isinstance(tensor, ir.ExternalTensor):
                raw = ir.ExternalTensor(
                    tensor.location,
                    tensor.offset,
                    tensor.length,
                    _D.UINT8,
                    shape=shape,
                    name=name,
                    base_dir=tensor.base_dir,
                )
            else:
                data = np.frombuffer(tensor.tobytes(), np.uint8).reshape(shape.numpy())
                raw = ir.Tensor(data, name=name)
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


# -- recognising ----------------------------------------------------------------------------------


def _weights(value: ir.Value, turned: bool) -> Codes | None:
    """Quantized weights of a product: ``[k, n]``, or ``[n, k]`` if ``turned``."""
    node = value.producer()
    if node is not None and node.op_type == "Transpose" and not turned:
        order = node.attributes["perm"].as_ints() if "perm" in node.attributes else (1, 0)
        source = node.inputs[0]
        return _dequantized(source) if source is not None and tuple(order) == (1, 0) else None
    return _dequantized(value, flipped=not turned)


def _dequantized(value: ir.Value, flipped: bool = False) -> Codes | None:
    """The constant that ``value`` dequantizes, as rows ``[n, k]``; columns if ``flipped``."""
    node = value.producer()
    if node is None or node.op_type != "DequantizeLinear" or node.domain not in ("", "ai.onnx"):
        return None
    codes, scale, zero, *_ = (*node.inputs, None)
    planes = signed = False
    unpack = codes.producer() if codes is not None else None
    if unpack is not None and (unpack.domain, unpack.op_type) == (HAL_DOMAIN, "UnpackBits"):
        codes, planes = unpack.inputs[0], _attribute(unpack, "bits", 3) == 3
        signed = bool(_attribute(unpack, "signed", 0))
        if signed and zero is not None:
            return None
    if codes is None or scale is None or not all(_constant(v) for v in (codes, scale, zero) if v):
        return None
    if value.dtype is not _D.FLOAT or _tensor(codes).dtype not in _BITS:
        return None
    shape = [int(d) for d in _tensor(codes).shape.numpy()]
    if len(shape) != 2 or min(shape) == 0 or not _half(scale):
        return None
    if planes:
        shape[1] = shape[1] // 3 * 8
    n, k = reversed(shape) if flipped else shape
    group = _group(node, _tensor(scale).shape.numpy(), (n, k), flipped)
    if group is None:
        return None
    bits = 3 if planes else _BITS[_tensor(codes).dtype]
    return Codes(codes, scale, zero, n, k, bits, group, flipped, planes, signed)


def _group(node: ir.Node, scale: Sequence[int], size: tuple[int, int], flipped: bool) -> int | None:
    """How many weights along K share a scale, or None for scales that go another way."""
    n, k = size
    block: int = _attribute(node, "block_size", 0)
    axis = _attribute(node, "axis", 1) % 2
    along = 0 if flipped else 1
    if block:
        groups = -(-k // block)
        wanted = (groups, n) if flipped else (n, groups)
        return min(block, k) if axis == along and tuple(scale) == wanted else None
    if math.prod(scale) == 1:
        return k
    return k if axis != along and tuple(scale) == (n,) else None


def _rounding(x: ir.Value) -> tuple[int, int]:
    """Block and bits of the ``RoundActivations`` that makes ``x``; a block of 0 for none."""
    node = x.producer()
    if node is None or (node.domain, node.op_type) != (HAL_DOMAIN, "RoundActivations"):
        return 0, 8
    source, last = node.inputs[0], x.shape[-1] if x.shape is not None else None
    bits, block = _attribute(node, "bits", 8), _attribute(node, "block_size", 0)
    if source is None or source.dtype is not _D.FLOAT or not isinstance(last, int):
        return 0, 8
    return (block or last, bits) if 2 <= bits <= 8 else (0, 8)


def _plain_gemm(node: ir.Node) -> bool:
    """Whether a node is a product and a sum without factors (any ``MatMul`` is)."""
    factors = (_attribute(node, "alpha", 1.0), _attribute(node, "beta", 1.0))
    return factors == (1.0, 1.0) and not _attribute(node, "transA", 0)


def _attribute(node: ir.Node, name: str, default: Any) -> Any:
    attribute = node.attributes.get(name)
    return default if attribute is None or attribute.value is None else attribute.value


def _attributes(layout: Layout) -> Iterator[ir.Attr]:
    for field in dataclasses.fields(Layout):
        yield ir.AttrInt64(field.name, int(getattr(layout, field.name)))


def _constant(value: ir.Value) -> bool:
    return value.const_value is not None and not value.is_graph_input()


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value


def _array(value: ir.Value) -> np.ndarray:
    return _tensor(value).numpy()


def _half(scale: ir.Value) -> bool:
    """Whether scales are finite in float16 without loss."""
    if _tensor(scale).dtype is _D.FLOAT16:
        return True
    if _tensor(scale).dtype is not _D.FLOAT:
        return False
    array = _array(scale)
    with np.errstate(over="ignore"):
        return bool((array.astype(np.float16).astype(np.float32) == array).all())


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
