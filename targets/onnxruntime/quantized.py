"""Quantized weights to the runtime's kernels that read them as they are stored.

``MatMul(x, Transpose(DequantizeLinear(codes, scale)))`` becomes ``MatMulNBits``, ``Gather`` from
such a table ``GatherBlockQuantized``, and a mixture of experts ``QMoE``. Codes become unsigned, in
rows of blocks; they are written next to the model when it is built.

The CPU kernels of onnxruntime 1.32 that were found to run at full speed decide the containers:

- with activations rounded to 8 bits (``accuracy_level`` 4): 8, 4 and, in blocks of 32 and more,
  2 bits; the rounding is that of ``hal::RoundActivations``, to the last bits;
- with float activations: 4 bits only (others dequantize the whole matrix in every call, 20 to 60
  times slower). So 8-bit codes are split in two products of 4 bits, ``16 * (h - 8) + l``, which is
  exact; 3- and 2-bit codes are stored in 4 bits, and floats of 4 bits, doubled, are codes of 8.

What does not fit stays ``DequantizeLinear``, which the runtime expands in each call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from hal.ir import HAL_DOMAIN
from hal.ir.small_floats import RESTATED_KEY, restate_small_floats
from hal.targets.onnxruntime.float_codes import widen_floats
from hal.targets.onnxruntime.heads import products_by_head
from hal.targets.onnxruntime.moe import CONTRIB, GATED, Emitter, router_logits, takes_part

STORED_KEY = "hal.stored"
"""Node metadata: how the codes are stored where that is not how the graph has them."""

_FLOAT32 = 1
_INT8 = 4
_LARGEST_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A quantized weight: ``scale * (codes - zero)`` in blocks along the last axis.

    Attributes:
        bits: bits that a code needs: 8, 4, 3 or 2.
        shape: extents of the weight.
        block: elements that share a scale: a power of two from 16, the last block may be shorter.
        read: codes uint8 ``[R, C]``, scale float32 ``[R, G]`` and zero points uint8 ``[R, G]`` or
            None for the middle code.
        name: of the codes in the graph.
        zeros: whether there are zero points.
        source: what the codes are in the neutral graph, where that is not integers of ``bits``.
    """

    bits: int
    shape: tuple[int, ...]
    block: int
    read: Callable[[], tuple[np.ndarray, np.ndarray, np.ndarray | None]]
    name: str
    zeros: bool
    source: str = ""

    @property
    def count(self) -> int:
        """Blocks of a row."""
        return -(-self.shape[-1] // self.block)


def fuse_quantized(model: ir.Model) -> bool:
    """Rewrite ``model`` in place where a kernel reads the codes; say whether there was one."""
    changed = restate_small_floats(model.graph)
    changed |= products_by_head(model.graph)
    made = _Made(model.graph)
    for node in list(model.graph):
        if node.op_type == "MatMul" and not node.domain:
            changed |= _product(made, node)
        elif node.op_type == "Gather" and not node.domain:
            changed |= _look_up(made, node)
        elif node.op_type == "MixtureOfExperts" and node.domain == HAL_DOMAIN:
            changed |= _experts(made, node)
    changed |= widen_floats(model.graph, STORED_KEY)
    if changed:
        common.RemoveUnusedNodesPass()(model)
    return changed


# -- finding quantized weights ----------------------------------------------------------------


def blocks_of(value: ir.Value | None) -> Blocks | None:
    """The quantized weight that ``value`` is, if it is one that the kernels can read."""
    node = value.producer() if value is not None else None
    if value is None or node is None or node.op_type != "DequantizeLinear" or node.domain:
        return None
    codes, scale, zero = [*node.inputs, None][:3]
    packed = codes.producer() if codes is not None else None
    three = packed is not None and packed.op_type == "UnpackBits" and packed.domain == HAL_DOMAIN
    signed = codes is not None and codes.dtype in _SIGNED
    if three and packed is not None:
        codes = packed.inputs[0]
    constants = [v for v in (codes, scale, zero) if v is not None]
    if any(v.const_value is None or not v.is_initializer() for v in constants):
        return None
    if codes is None or scale is None or value.shape is None or not value.shape.is_static():
        return None
    shape = tuple(value.shape.numpy())
    if value.dtype is not ir.DataType.FLOAT or codes.dtype not in _BITS or len(shape) < 2:
        return None
    block = _block(node, shape)
    if block is None:
        return None
    bits = 3 if three else _BITS[codes.dtype]
    zeros = zero is not None or not signed
    read = _Reader(codes, scale, zero, shape, block, three, signed)
    was = node.metadata_props.get(RESTATED_KEY, "")
    source = f"{was}-bit float" if was else ""
    return Blocks(bits, shape, block, read, codes.name or "codes", zeros, source)


_BITS = {
    ir.DataType.INT8: 8, ir.DataType.UINT8: 8, ir.DataType.INT4: 4, ir.DataType.UINT4: 4,
    ir.DataType.INT2: 2, ir.DataType.UINT2: 2,
}  # fmt: skip

_SIGNED = (ir.DataType.INT8, ir.DataType.INT4, ir.DataType.INT2)


def _block(node: ir.Node, shape: tuple[int, ...]) -> int | None:
    """The length of a block; a scale for each row is repeated for blocks that kernels know."""
    axis = node.attributes.get_int("axis", 1)
    size = node.attributes.get_int("block_size", 0)
    by_row = size == 0 and axis in (0, -2) and len(shape) == 2
    known = size >= 16 and not size & (size - 1)
    if by_row or (size == shape[-1] and not known):
        fitting = [b for b in (128, 64, 32, 16) if shape[-1] % b == 0]
        return fitting[0] if fitting else _LARGEST_BLOCK
    return size if known and axis in (-1, len(shape) - 1) else None


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads the constants of a ``DequantizeLinear`` when the build writes them."""

    codes: ir.Value
    scale: ir.Value
    zero: ir.Value | None
    shape: tuple[int, ...]
    block: int
    three: bool
    signed: bool

    def __call__(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        columns = self.shape[-1]
        codes = _unsigned(self.codes)
        if self.three:
            codes = _three_bits(codes.reshape(-1, columns * 3 // 8), columns)
        codes = codes.reshape(-1, columns)
        count = -(-columns // self.block)
        assert self.scale.const_value is not None
        scale = self.scale.const_value.numpy().astype(np.float32).reshape(len(codes), -1)
        zero = None
        if self.zero is not None:
            zero = _unsigned(self.zero).reshape(len(codes), -1)
        elif not self.signed:
            zero = np.zeros(scale.shape, np.uint8)
        if scale.shape[1] == 1:
            scale = np.repeat(scale, count, 1)
            zero = None if zero is None else np.repeat(zero, count, 1)
        return codes, scale, zero


def _unsigned(value: ir.Value) -> np.ndarray:
    """Elements as uint8, signed ones moved up by half their range."""
    tensor = value.const_value
    assert tensor is not None
    bits = _BITS[tensor.dtype]
    array = tensor.numpy()
    if tensor.dtype in _SIGNED:
        return (array.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    return array.astype(np.uint8)


def _three_bits(packed: np.ndarray, columns: int) -> np.ndarray:
    """Codes ``[R, C]`` of ``hal::UnpackBits``."""
    low, high = packed[:, : columns // 4, None], packed[:, columns // 4 :, None]
    two = (low >> np.array([0, 2, 4, 6], np.uint8)) & 3
    one = (high >> np.arange(8, dtype=np.uint8)) & 1
    return two.reshape(len(packed), -1) | (one.reshape(len(packed), -1) << 2)


# -- what the kernels read --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Plane:
    """One operand of a kernel: codes of ``bits``, and what scale and zero points become."""

    bits: int
    part: str = ""  # "", or the "high" or "low" half of 8-bit codes

    def codes(self, blocks: Blocks) -> np.ndarray:
        """Packed codes uint8 ``[R, G, block * bits / 8]``; zeros behind the last column."""
        codes = blocks.read()[0]
        if self.part:
            codes = codes >> 4 if self.part == "high" else codes & 15
        elif self.widened(blocks):
            codes = codes + np.uint8(8 - (1 << (blocks.bits - 1)))
        width = blocks.count * blocks.block
        if width > codes.shape[1]:
            codes = np.pad(codes, ((0, 0), (0, width - codes.shape[1])))
        return pack(codes, self.bits).reshape(len(codes), blocks.count, -1)

    def widened(self, blocks: Blocks) -> bool:
        """Whether codes without zero points move to the middle of a wider container."""
        return not blocks.zeros and self.bits > blocks.bits

    def scale(self, blocks: Blocks) -> np.ndarray:
        """Scales float32 ``[R, G]``."""
        scale = blocks.read()[1]
        return scale * np.float32(16) if self.part == "high" else scale

    def has_zero(self, blocks: Blocks) -> bool:
        """Whether there are zero points that are not the middle code."""
        return self.part == "low" or blocks.zeros

    def zero(self, blocks: Blocks) -> np.ndarray:
        """Packed zero points uint8 ``[R, ceil(G * bits / 8)]``."""
        _, scale, zero = blocks.read()
        if zero is None:
            zero = np.full(scale.shape, 128 if self.part else 1 << (self.bits - 1), np.uint8)
        if self.part:
            zero = zero >> 4 if self.part == "high" else zero & 15
        each = 8 // self.bits
        return pack(np.pad(zero, ((0, 0), (0, -zero.shape[1] % each))), self.bits)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes uint8 ``[R, C]`` with the first in the low bits, uint8 ``[R, C * bits / 8]``."""
    if bits == 8:
        return np.ascontiguousarray(codes)
    each = 8 // bits
    apart = codes.reshape(len(codes), -1, each)
    packed = apart[:, :, 0].copy()
    for place in range(1, each):
        packed |= apart[:, :, place] << np.uint8(place * bits)
    return packed


def _planes(blocks: Blocks, rounded: bool) -> list[_Plane]:
    """The products that a weight becomes; see the module's text."""
    if rounded and (blocks.bits == 8 or (blocks.bits == 2 and blocks.block >= 32)):
        return [_Plane(blocks.bits)]
    if blocks.bits == 8:
        return [_Plane(4, "high"), _Plane(4, "low")]
    return [_Plane(4)]


def is_upper_half(node: ir.Node) -> bool:
    """Whether a node is the first of the two products that 8-bit codes became."""
    codes = node.inputs[1] if node.op_type == "MatMulNBits" else None
    return codes is not None and "/high/" in (codes.name or "")


class _Made:
    """New initializers, each made once for all that read it."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._done: dict[str, ir.Value] = {}

    def operands(self, blocks: Blocks, plane: _Plane, flat: bool) -> list[ir.Value | None]:
        """Codes, scale and zero points; ``flat`` gives codes ``[R, C * bits / 8]``."""
        rows, count = int(np.prod(blocks.shape[:-1])), blocks.count
        base = f"{blocks.name}/{plane.part or plane.bits}"
        inner = blocks.block * plane.bits // 8
        shape = (rows, count * inner) if flat else (rows, count, inner)
        codes = self.tensor(
            f"{base}/{'rows' if flat else 'blocks'}",
            lambda: plane.codes(blocks).reshape(shape),
            ir.DataType.UINT8,
            shape,
        )
        scale = self.tensor(
            f"{base}/scale", lambda: plane.scale(blocks), ir.DataType.FLOAT, (rows, count)
        )
        if not plane.has_zero(blocks):
            return [codes, scale, None]
        each = 8 // plane.bits
        zero = self.tensor(
            f"{base}/zero",
            lambda: plane.zero(blocks),
            ir.DataType.UINT8,
            (rows, -(-count // each)),
        )
        return [codes, scale, zero]

    def tensor(
        self,
        name: str,
        compute: Callable[[], np.ndarray],
        dtype: ir.DataType,
        shape: tuple[int, ...],
    ) -> ir.Value:
        """An initializer that is computed when its bytes are read."""
        if name not in self._done:
            lazy = ir.LazyTensor(
                lambda: ir.Tensor(np.ascontiguousarray(compute()), dtype),
                dtype,
                ir.Shape(shape),
                name=name,
            )
            value = ir.Value(
                name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=lazy
            )
            self.graph.register_initializer(value)
            self._done[name] = value
        return self._done[name]


# -- the rewrites -----------------------------------------------------------------------------


def _product(made: _Made, node: ir.Node) -> bool:
    """``MatMul(x, Transpose(w))``, x rounded or not."""
    x, across = node.inputs
    turn = across.producer() if across is not None else None
    if x is None or turn is None or turn.op_type != "Transpose" or turn.domain:
        return False
    if list(turn.attributes.get_ints("perm", [1, 0])) != [1, 0]:
        return False
    blocks = blocks_of(turn.inputs[0])
    if blocks is None or len(blocks.shape) != 2 or x.dtype is not ir.DataType.FLOAT:
        return False
    source = _rounded(x, blocks)
    planes = _planes(blocks, source is not None)
    result = node.outputs[0]
    emit = Emitter(result.name or "product")
    terms = []
    for plane in planes:
        codes, scale, zero = made.operands(blocks, plane, flat=False)
        inputs = [x if source is None else source, codes, scale]
        term = emit(
            "MatMulNBits",
            inputs if zero is None else [*inputs, zero],
            domain=CONTRIB,
            like=result,
            K=blocks.shape[1],
            N=blocks.shape[0],
            bits=plane.bits,
            block_size=blocks.block,
            accuracy_level=_FLOAT32 if source is None else _INT8,
        )
        terms.append(term)
    _finish(made.graph, node, emit, terms, blocks, planes)
    return True


def _rounded(x: ir.Value, blocks: Blocks) -> ir.Value | None:
    """What ``x`` is rounded from, if it is so as the kernel does it."""
    node = x.producer()
    if node is None or node.domain != HAL_DOMAIN or node.op_type != "RoundActivations":
        return None
    bits = node.attributes.get_int("bits", 8)
    same = bits == 8 and node.attributes.get_int("block_size", 0) == blocks.block
    return node.inputs[0] if same else None


def _look_up(made: _Made, node: ir.Node) -> bool:
    """``Gather(w, ids)`` along rows; 8-bit codes need no halves here."""
    table, ids = node.inputs
    blocks = blocks_of(table)
    if blocks is None or len(blocks.shape) != 2 or blocks.shape[1] % blocks.block:
        return False
    if node.attributes.get_int("axis", 0) not in (0, -2):
        return False
    plane = _Plane(4 if blocks.bits == 3 else blocks.bits)
    result = node.outputs[0]
    emit = Emitter(result.name or "rows")
    codes, scale, zero = made.operands(blocks, plane, flat=True)
    rows = emit(
        "GatherBlockQuantized",
        [codes, ids, scale] if zero is None else [codes, ids, scale, zero],
        domain=CONTRIB,
        like=result,
        bits=plane.bits,
        block_size=blocks.block,
        gather_axis=0,
        quantize_axis=1,
    )
    _finish(made.graph, node, emit, [rows], blocks, [plane])
    return True


def _experts(made: _Made, node: ir.Node) -> bool:
    """``hal::MixtureOfExperts`` over quantized experts, gate and up rows interleaved."""
    gate_up, down = blocks_of(node.inputs[3]), blocks_of(node.inputs[4])
    if gate_up is None or down is None or not takes_part(node):
        return False
    bits = max(gate_up.bits, down.bits)
    fits = all(
        not b.zeros and b.shape[-1] % b.block == 0 and len(b.shape) == 3 for b in (gate_up, down)
    )
    by_row = [_one_scale(v) for v in node.inputs[3:5]]
    if not fits or by_row[0] != by_row[1] or (not by_row[0] and gate_up.block != down.block):
        return False
    if bits == 8 and not by_row[0]:
        return False  # the kernel would round the activations
    plane = _Plane(8 if bits == 8 else 4)
    result = node.outputs[0]
    emit = Emitter(result.name or "experts")
    logits, total, chosen = router_logits(emit, node, gate_up.shape[0])
    operands = []
    for blocks, mixed in ((gate_up, True), (down, False)):
        operands.append(_expert_operands(made, blocks, plane, mixed, by_row[0]))
    attributes: dict[str, Any] = {} if by_row[0] else {"block_size": gate_up.block}
    fused = emit(
        "QMoE",
        [node.inputs[0], logits, *operands[0], None, *operands[1]],
        domain=CONTRIB,
        k=chosen,
        **GATED,
        expert_weight_bits=plane.bits,
        **attributes,
    )
    _finish(made.graph, node, emit, [emit("Mul", [fused, total], like=result)], gate_up, [plane])
    return True


def _one_scale(value: ir.Value | None) -> bool:
    """Whether each row of experts has one scale."""
    node = value.producer() if value is not None else None
    if node is None or value is None or value.shape is None:
        return False
    return node.attributes.get_int("block_size", 0) == value.shape[-1]


def _expert_operands(
    made: _Made, blocks: Blocks, plane: _Plane, mixed: bool, by_row: bool
) -> list[ir.Value]:
    experts, rows, _ = blocks.shape
    inner = blocks.count * blocks.block * plane.bits // 8
    scales = (experts, rows) if by_row else (experts, rows, blocks.count)

    def order(array: np.ndarray) -> np.ndarray:
        apart = array.reshape(experts, rows, -1)
        return apart.reshape(experts, 2, rows // 2, -1).swapaxes(1, 2) if mixed else apart

    def scale() -> np.ndarray:
        found = order(plane.scale(blocks)).reshape(experts, rows, blocks.count)
        return found[:, :, 0] if by_row else found

    base = f"{blocks.name}/{plane.bits}/experts"
    return [
        made.tensor(
            base,
            lambda: order(plane.codes(blocks)).reshape(experts, rows, inner),
            ir.DataType.UINT8,
            (experts, rows, inner),
        ),
        made.tensor(f"{base}/scale", scale, ir.DataType.FLOAT, scales),
    ]


def _finish(
    graph: ir.Graph,
    node: ir.Node,
    emit: Emitter,
    terms: list[ir.Value],
    blocks: Blocks,
    planes: list[_Plane],
) -> None:
    result = node.outputs[0]
    total = terms[0] if len(terms) == 1 else emit("Add", terms, like=result)
    stored = sum(plane.bits for plane in planes)
    if stored != blocks.bits or blocks.source:
        kind = blocks.source or f"{blocks.bits}-bit"
        emit.nodes[0].metadata_props[STORED_KEY] = f"{kind} codes in {stored} bits"
    ir.convenience.replace_nodes_and_values(graph, node, [node], emit.nodes, [result], [total])
