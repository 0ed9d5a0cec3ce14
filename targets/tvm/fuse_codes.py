"""Convolutions and maxima of 8-bit codes become ops that compute on codes.

``Conv(DequantizeLinear(x), DequantizeLinear(w))`` and what follows it alone (a rounding to codes
and back before the sum with other codes, ``Relu`` or ``Clip``, ``QuantizeLinear``) turns into
``hal.tvm::CodesConvolution(words, packed, start, factor, bias[, residual])``, and ``MaxPool``
between codes of one scale into ``hal.tvm::CodesLargest(words)``. ``PackCodes`` and ``UnpackCodes``
stand between words (:mod:`hal.kernels.codes_convolution`) and codes as ONNX has them, where
neighbours do not take words. Scales are of whole tensors, those of weights of output channels.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import onnx_ir as ir

from hal.ir import Graph
from hal.kernels import codes_convolution as kernel
from hal.kernels.codes_convolution import Rounding
from hal.kernels.convolution_plan import Geometry, Plan
from hal.targets.tvm.fuse_convolutions import (
    attributes,
    constant,
    geometry_of,
    initializer,
    limits_of,
    only_reader,
)
from hal.targets.tvm.lowering import Shaping
from hal.targets.tvm.own_ops import DOMAIN
from hal.targets.tvm.quantized_codes import attribute

CONVOLUTION, LARGEST, PACK, UNPACK = (
    "CodesConvolution", "CodesLargest", "PackCodes", "UnpackCodes",
)  # fmt: skip

_D = ir.DataType
_BYTES = (_D.UINT8, _D.INT8)


def fuse_codes(graph: Graph, shaping: Shaping) -> None:
    """Rewrite ``graph`` in place; nothing happens where the chip has no dot product of bytes."""
    if shaping.dot is None:
        return
    rewrite = _Rewrite(graph, shaping)
    for node in list(graph.graph):
        if node.graph is None or node.domain:
            continue
        if node.op_type == "Conv":
            rewrite.convolution(node)
        elif node.op_type == "MaxPool":
            rewrite.largest(node)
    rewrite.finish()


def plan_of(node: ir.Node, shaping: Shaping) -> Plan:
    """The plan of a ``CodesConvolution``: what it was fused by."""
    assert shaping.dot is not None
    made = kernel.plan(geometry(node), shaping.dot, shaping.registers)
    assert made is not None
    return made


def geometry(node: ir.Node) -> Geometry:
    """The sizes that a fused node carries."""
    values = {f.name: node.attributes[f.name].value for f in dataclasses.fields(Geometry)}
    sizes: dict[str, Any] = {n: v if isinstance(v, int) else tuple(v) for n, v in values.items()}
    return Geometry(**sizes)


def rounding(node: ir.Node, name: str) -> Rounding | None:
    """The rounding of that name in a fused node's attributes, if there is one."""
    scale = node.attributes.get(f"{name}_scale")
    if scale is None:
        return None
    return Rounding(scale.as_float(), node.attributes[f"{name}_zero"].as_int())


@dataclasses.dataclass(frozen=True)
class _Coded:
    """A tensor of codes and what they stand for."""

    value: ir.Value
    rounding: Rounding


class _Chain:
    """A convolution and what of its successors its kernel does."""

    def __init__(self, node: ir.Node) -> None:
        self.nodes = [node]
        self.middle: Rounding | None = None
        self.residual: _Coded | None = None
        self.limits: dict[str, float] = {}
        self.out: _Coded | None = None
        after = self._take_limits(self._next())
        if after is None:
            return
        coded = _coded_by(after)
        if coded is not None:
            after = self._residual_behind(after, coded) if not self.limits else None
            if after is None:
                self._end(coded)
                return
        elif not self.limits and (other := self._other(after, self.last.outputs[0])):
            self.residual = other
            self.nodes.append(after)
            after = self._next()
        else:
            return
        after = self._take_limits(after)
        if after is not None and (coded := _coded_by(after)):
            self._end(coded)

    @property
    def last(self) -> ir.Node:
        """Whose place the fused op takes."""
        return self.nodes[-1]

    def _next(self) -> ir.Node | None:
        node = only_reader(self.last.outputs[0], self.last)
        return node if node is not None and not node.domain else None

    def _take_limits(self, after: ir.Node | None) -> ir.Node | None:
        """Go past limits."""
        limits = limits_of(after) if after is not None else None
        if after is None or limits is None:
            return after
        self.limits = limits
        self.nodes.append(after)
        return self._next()

    def _residual_behind(self, quantize: ir.Node, coded: _Coded) -> ir.Node | None:
        """Go past a rounding to codes and back and a sum, if they follow; what comes then."""
        back = only_reader(quantize.outputs[0], quantize)
        if back is None or _codes(back.outputs[0]) is None:
            return None
        add = only_reader(back.outputs[0], back)
        other = self._other(add, back.outputs[0]) if add is not None else None
        if add is None or other is None:
            return None
        self.middle, self.residual = coded.rounding, other
        self.nodes += [quantize, back, add]
        return self._next() or _NOTHING

    def _other(self, add: ir.Node, own: ir.Value) -> _Coded | None:
        """The codes that are added, if they have the same shape."""
        if add.op_type != "Add" or add.domain:
            return None
        first, second = add.inputs
        other = second if first is own else first
        if other is None or other is own or other.shape is None or other.shape != own.shape:
            return None
        return _codes(other)

    def _end(self, coded: _Coded) -> None:
        quantize = coded.value.producer()
        assert quantize is not None
        self.nodes.append(quantize)
        self.out = coded


_NOTHING = ir.Node("", "Nothing", [])
"""What follows a sum that several read, or that is a result: it is stored as floats."""


class _Rewrite:
    def __init__(self, graph: Graph, shaping: Shaping) -> None:
        self._graph, self._nodes, self._shaping = graph, graph.graph, shaping
        assert shaping.dot is not None
        self._dot = shaping.dot
        self._words: dict[ir.Value, ir.Value] = {}
        """Words of codes."""
        self._packs: dict[ir.Value, ir.Value] = {}
        """Those that a node packs: a later rewrite may find that its input comes from words."""

    def convolution(self, node: ir.Node) -> None:
        """Rewrite one, if a kernel computes it."""
        x = _codes(node.inputs[0])
        weights = node.inputs[1]
        read = weights.producer() if weights is not None else None
        if x is None or weights is None or read is None or not _weights(read):
            return
        sizes = geometry_of(node, x.value, weights)
        made = kernel.plan(sizes, self._dot, self._shaping.registers) if sizes else None
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        added = constant(bias) if bias is not None else None
        if sizes is None or made is None or (bias is not None and added is None):
            return
        chain = _Chain(node)
        codes, scales = read.inputs[0], constant(read.inputs[1])
        assert codes is not None
        assert scales is not None
        unit = chain.middle or (chain.out.rounding if chain.out else None)
        per = unit.scale if unit else 1.0
        factor = np.broadcast_to(scales.astype(np.float64).reshape(-1), [sizes.outputs])
        parts = [
            self._packed(codes, made),
            self._starts(codes, x.rounding.zero, made),
            self._each(f"{codes.name}.factor", factor * x.rounding.scale / per, made),
            self._each(
                f"{codes.name}.added",
                np.zeros(sizes.outputs) if added is None else added.astype(np.float64) / per,
                made,
            ),
        ]
        given = {"x": x.rounding, "middle": chain.middle}
        given |= {"residual": chain.residual.rounding if chain.residual else None}
        given |= {"out": chain.out.rounding if chain.out else None}
        others = [self._words_of(chain.residual.value)] if chain.residual else []
        fused = ir.Node(
            DOMAIN,
            CONVOLUTION,
            [self._words_of(x.value), *parts, *others],
            [
                *attributes(dataclasses.asdict(sizes)),
                *attributes(chain.limits),
                *(a for name, value in given.items() if value for a in _attributes(name, value)),
            ],
            name=node.name,
        )
        self._replace(fused, chain.nodes, chain.out is not None)

    def largest(self, node: ir.Node) -> None:
        """Rewrite a ``MaxPool`` whose input comes in words, and whose result is rounded alike."""
        x, after = _codes(node.inputs[0]), only_reader(node.outputs[0], node)
        out = _coded_by(after) if after is not None else None
        plain = not attribute(node, "ceil_mode", 0) and not attribute(node, "storage_order", 0)
        if x is None or out is None or after is None or not plain or len(node.outputs) > 1:
            return
        if x.value not in self._words or x.rounding != out.rounding:
            return
        sizes = _pooled(node, x.value)
        if sizes is None or kernel.largest_plan(sizes, self._dot, self._shaping.registers) is None:
            return
        fused = ir.Node(
            DOMAIN,
            LARGEST,
            [self._words[x.value]],
            attributes(dataclasses.asdict(sizes)),
            name=node.name,
        )
        self._replace(fused, [node, after], True)

    def finish(self) -> None:
        """Remove what nobody reads any more, packing of what comes from words first."""
        for codes, words in list(self._packs.items()):
            maker = codes.producer()
            if maker is not None and maker.op_type == UNPACK and maker.inputs[0] is not None:
                words.replace_all_uses_with(maker.inputs[0])
        for node in reversed(list(self._nodes)):
            unread = all(not v.uses() and not v.is_graph_output() for v in node.outputs)
            if unread and (node.op_type == "DequantizeLinear" or node.domain == DOMAIN):
                self._nodes.remove(node, safe=True)

    def _replace(self, fused: ir.Node, nodes: list[ir.Node], words: bool) -> None:
        """Put ``fused`` in the place of ``nodes``; behind words, codes for whoever wants them."""
        old, made = nodes[-1].outputs[0], [fused]
        if words:
            signed = int(old.dtype is _D.INT8)
            shape = tuple(int(d) for d in list(old.shape)[1:])  # type: ignore[arg-type]
            given = attributes({"signed": signed, "shape": shape})
            made.append(ir.Node(DOMAIN, UNPACK, [fused.outputs[0]], given))
            fused.outputs[0].name = f"{old.name}.words"
            _set_words(fused.outputs[0], old)
        new = made[-1].outputs[0]
        self._nodes.insert_before(nodes[-1], made)
        new.name, new.type, new.shape = old.name, old.type, old.shape
        old.name = f"{old.name}.replaced"
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        if old in self._packs:
            self._packs[new] = self._packs.pop(old)
        if words:
            self._words[new] = fused.outputs[0]
        for gone in reversed(nodes):
            self._nodes.remove(gone, safe=True)
        self._nodes.opset_imports[DOMAIN] = 1

    def _words_of(self, codes: ir.Value) -> ir.Value:
        """The codes in words; where they are none, a node that packs them."""
        if codes not in self._words:
            pack = ir.Node(
                DOMAIN, PACK, [codes], attributes({"signed": int(codes.dtype is _D.INT8)})
            )
            pack.outputs[0].name = f"{codes.name}.words"
            _set_words(pack.outputs[0], codes)
            maker = codes.producer()
            if maker is not None:
                self._nodes.insert_after(maker, pack)
            else:
                self._nodes.insert_before(self._nodes[0], pack)
            self._words[codes] = self._packs[codes] = pack.outputs[0]
        return self._words[codes]

    def _packed(self, codes: ir.Value, made: Plan) -> ir.Value:
        tensor, name = codes.const_value, f"{codes.name}.packed"
        assert tensor is not None
        blocks, terms, height = made.packed_shape
        alone = made.geometry.groups > 1
        room = 0 if alone else -(-made.lanes // height) - 1
        shape = ir.Shape((blocks, terms + room, height))

        def pack() -> ir.TensorProtocol:
            return ir.Tensor(kernel.pack(tensor.numpy(), made))

        lazy = ir.LazyTensor(pack, dtype=_D.FLOAT if alone else _D.INT32, shape=shape, name=name)
        return initializer(self._graph, lazy, name)

    def _starts(self, codes: ir.Value, zero: int, made: Plan) -> ir.Value:
        tensor, name, dot = codes.const_value, f"{codes.name}.start", self._dot
        assert tensor is not None

        def compute() -> ir.TensorProtocol:
            return ir.Tensor(kernel.starts(tensor.numpy(), zero, made, dot))

        shape = ir.Shape((kernel.padded(made),))
        kind = _D.FLOAT if made.geometry.groups > 1 else _D.INT32
        lazy = ir.LazyTensor(compute, dtype=kind, shape=shape, name=name)
        return initializer(self._graph, lazy, name)

    def _each(self, name: str, values: np.ndarray, made: Plan) -> ir.Value:
        array = np.zeros(kernel.padded(made), np.float32)
        array[: values.size] = values.reshape(-1)
        return initializer(self._graph, ir.Tensor(array, name=name), name)


def _set_words(words: ir.Value, codes: ir.Value) -> None:
    """Type and shape."""
    batch, channels, *sizes = codes.shape  # type: ignore[misc]
    count = -(-int(channels) // kernel.PER_WORD)  # type: ignore[arg-type]
    pixels: int = math.prod(int(d) for d in sizes)  # type: ignore[arg-type,misc]
    words.type, words.shape = ir.TensorType(_D.INT32), ir.Shape([batch, count, pixels])


def _attributes(name: str, value: Rounding) -> list[ir.Attr]:
    return [
        ir.AttrFloat32(f"{name}_scale", value.scale), ir.AttrInt64(f"{name}_zero", value.zero)
    ]  # fmt: skip


def _weights(node: ir.Node) -> bool:
    """Whether it gives weights: constant signed bytes, a scale for each or all, no zero points."""
    if node.op_type != "DequantizeLinear" or node.domain or attribute(node, "block_size", 0):
        return False
    codes, scales = node.inputs[0], constant(node.inputs[1])
    if codes is None or codes.const_value is None or codes.dtype is not _D.INT8 or scales is None:
        return False
    if scales.size > 1 and attribute(node, "axis", 1) != 0:
        return False
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        zeros = constant(node.inputs[2])
        return zeros is not None and not zeros.any()
    return True


def _codes(value: ir.Value | None) -> _Coded | None:
    """The codes that a float tensor comes from."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "DequantizeLinear" or node.domain:
        return None
    codes = node.inputs[0]
    found = _rounding(node, codes)
    if found is None or codes is None or codes.const_value is not None or codes.shape is None:
        return None
    known = len(codes.shape) >= 3 and all(isinstance(d, int) for d in list(codes.shape)[1:])
    return _Coded(codes, found) if known else None


def _coded_by(node: ir.Node) -> _Coded | None:
    """The codes that a ``QuantizeLinear`` makes, with one scale for all."""
    if node.op_type != "QuantizeLinear" or node.domain:
        return None
    found = _rounding(node, node.outputs[0])
    return _Coded(node.outputs[0], found) if found else None


def _rounding(node: ir.Node, codes: ir.Value | None) -> Rounding | None:
    scale = constant(node.inputs[1])
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    zeros = constant(zero) if zero is not None else np.zeros(())
    if codes is None or codes.dtype not in _BYTES or scale is None or scale.size != 1:
        return None
    if scale.dtype != np.float32 or zeros is None or zeros.size != 1 or not float(scale) > 0:
        return None
    moved = 128 if codes.dtype is _D.INT8 else 0
    return Rounding(float(scale.reshape(())), int(zeros.reshape(())) + moved)


def _pooled(node: ir.Node, x: ir.Value) -> Geometry | None:
    """Sizes of a ``MaxPool`` in words: each word is a channel by itself."""
    batch, channels, *sizes = x.shape  # type: ignore[misc]
    words = -(-int(channels) // kernel.PER_WORD)  # type: ignore[arg-type]
    window = ir.Value(
        name="window", shape=ir.Shape([words, 1, *attribute(node, "kernel_shape", [])])
    )
    like = ir.Value(name="words", shape=ir.Shape([batch, words, *sizes]))
    found = geometry_of(node, like, window)
    return dataclasses.replace(found, groups=words) if found else None
