"""Recognising quantized weights: constant ``DequantizeLinear`` of integers or small floats."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from hal.ir import HAL_DOMAIN
from hal.kernels.quantized_layout import float_numbers

_D = ir.DataType
_BITS = {_D.INT8: 8, _D.UINT8: 8, _D.INT4: 4, _D.UINT4: 4, _D.INT2: 2, _D.UINT2: 2}
_FLOATS = {_D.FLOAT8E4M3FN: 8, _D.FLOAT4E2M1: 4}
_SIGNED = frozenset({_D.INT8, _D.INT4, _D.INT2})


@dataclasses.dataclass(frozen=True)
class Codes:
    """A constant ``DequantizeLinear`` of a matrix, seen as rows ``[n, k]``.

    ``flipped``: the tensors are stored ``[k, n]``. ``group``: weights along ``k`` for each scale.
    ``planes``: the codes are three bits each, stored as ``hal::UnpackBits`` takes them; ``signed``:
    it takes 4 from each. ``stacked``: the tensors are matrices one after the other, ``n`` all rows.
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
    stacked: bool = False

    @property
    def floats(self) -> bool:
        """Whether codes are floats; those of 4 bits are taken doubled."""
        return self.codes_dtype in _FLOATS

    @property
    def symmetric(self) -> bool:
        """Whether zero is the middle of the range: signed codes, or unsigned ones around it."""
        if self.floats:
            return True
        if self.signed or self.codes_dtype in _SIGNED:
            return self.zero is None or not _array(self.zero).astype(np.int32).any()
        middle = 1 << (self.bits - 1)
        return self.zero is not None and bool((_array(self.zero).astype(np.int32) == middle).all())

    @property
    def stored_signed(self) -> bool:
        """Whether codes are signed integers."""
        return self.signed or self.codes_dtype in _SIGNED

    @property
    def codes_dtype(self) -> ir.DataType:
        """Dtype of the codes as stored."""
        return tensor_of(self.codes).dtype

    @property
    def scale_numbers(self) -> np.ndarray:
        """Scales as stored, as numbers; halved for codes that are taken doubled."""
        array = self._rows(_array(self.scale))
        if array.dtype.kind != "f":  # powers of two
            array = array.astype(np.float32)
        doubled = self.floats and self.bits == 4
        return array.astype(np.float32) * np.float32(0.5) if doubled else array

    def matrix(self) -> np.ndarray:
        """Codes ``[n, k]``: signed around zero if symmetric, unsigned otherwise."""
        stored = self._rows(_array(self.codes))
        if self.floats:
            bits = float_numbers(stored) if self.bits == 4 else stored.view(np.int8)
            return self._oriented(bits)
        values = unpacked_planes(stored) if self.planes else stored
        return self._oriented(self._shifted(values))

    def scales(self, group: int) -> np.ndarray:
        """Scales ``[n, groups]`` for a group that divides this one."""
        return self._repeated(self.scale_numbers, group)

    def zeros(self, group: int) -> np.ndarray | None:
        """Unsigned zero points ``[n, groups]``, or None if symmetric."""
        if self.symmetric:
            return None
        if self.zero is None:  # unsigned codes from zero up
            return np.zeros((self.n, -(-self.k // group)), np.uint8)
        return self._repeated(self._shifted(self._rows(_array(self.zero))), group)

    def _shifted(self, values: np.ndarray) -> np.ndarray:
        middle = 1 << (self.bits - 1)
        if self.symmetric == (self.codes_dtype in _SIGNED):
            return values.astype(np.int8 if self.symmetric else np.uint8)
        wide = values.astype(np.int16)
        return (
            (wide - middle).astype(np.int8) if self.symmetric else (wide + middle).astype(np.uint8)
        )

    def _rows(self, values: np.ndarray) -> np.ndarray:
        return values.reshape(self.n, -1) if self.stacked else values

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


def weights_of(value: ir.Value, turned: bool) -> Codes | None:
    """Quantized weights of a product: ``[k, n]``, or ``[n, k]`` if ``turned``."""
    node = value.producer()
    if node is not None and node.op_type == "Transpose" and not turned:
        order = node.attributes["perm"].as_ints() if "perm" in node.attributes else (1, 0)
        source = node.inputs[0]
        return dequantized(source) if source is not None and tuple(order) == (1, 0) else None
    return dequantized(value, flipped=not turned)


def dequantized(value: ir.Value, flipped: bool = False) -> Codes | None:
    """The constant that ``value`` dequantizes, as rows ``[n, k]``; columns if ``flipped``."""
    found = _constants(value, 2)
    if found is None:
        return None
    node, whole = found
    n, k = (whole.k, whole.n) if flipped else (whole.n, whole.k)
    group = _group(node, tensor_of(whole.scale).shape.numpy(), (n, k), flipped)
    if group is None:
        return None
    codes = dataclasses.replace(whole, n=n, k=k, group=group, flipped=flipped)
    return codes if _half(codes) else None


def stacked(value: ir.Value) -> Codes | None:
    """The constant matrices ``[count, rows, k]`` that ``value`` dequantizes, as ``count * rows``.

    None for codes that have no scales in blocks along ``k``.
    """
    found = _constants(value, 3)
    if found is None:
        return None
    node, whole = found
    block = attribute(node, "block_size", 0)
    if not block or attribute(node, "axis", 1) % 3 != 2:
        return None
    count, rows, groups = tensor_of(whole.scale).shape.numpy()
    if (count * rows, groups) != (whole.n, -(-whole.k // block)):
        return None
    codes = dataclasses.replace(whole, group=min(block, whole.k), stacked=True)
    return codes if _half(codes) else None


def heads_of(value: ir.Value) -> tuple[Codes, int] | None:
    """Quantized weights of a product with a matrix ``[k, n]`` for each head, and how many."""
    node = value.producer()
    if node is None or node.op_type != "Transpose" or node.inputs[0] is None:
        return None
    codes = stacked(node.inputs[0])
    if codes is None or tuple(node.attributes["perm"].as_ints()) != (0, 2, 1):
        return None
    return codes, int(tensor_of(codes.codes).shape.numpy()[0])


def _constants(value: ir.Value, rank: int) -> tuple[ir.Node, Codes] | None:
    """The ``DequantizeLinear`` of constants of ``rank`` axes, and those as rows ``[n, k]``."""
    node = value.producer()
    if node is None or node.op_type != "DequantizeLinear" or node.domain not in ("", "ai.onnx"):
        return None
    codes, scale, zero, *_ = (*node.inputs, None)
    planes = signed = False
    unpack = codes.producer() if codes is not None else None
    if unpack is not None and (unpack.domain, unpack.op_type) == (HAL_DOMAIN, "UnpackBits"):
        codes, planes = unpack.inputs[0], attribute(unpack, "bits", 3) == 3
        signed = bool(attribute(unpack, "signed", 0))
        if signed and zero is not None:
            return None
    if codes is None or scale is None or not all(_constant(v) for v in (codes, scale, zero) if v):
        return None
    dtype = tensor_of(codes).dtype
    bits = 3 if planes else (_BITS | _FLOATS).get(dtype)
    if value.dtype is not _D.FLOAT or bits is None or (dtype in _FLOATS and zero is not None):
        return None
    shape = [int(d) for d in tensor_of(codes).shape.numpy()]
    if len(shape) != rank or min(shape) == 0:
        return None
    k = shape[-1] // 3 * 8 if planes else shape[-1]
    n = math.prod(shape[:-1])
    return node, Codes(codes, scale, zero, n, k, bits, 0, planes=planes, signed=signed)


def _group(node: ir.Node, scale: Sequence[int], size: tuple[int, int], flipped: bool) -> int | None:
    """How many weights along K share a scale, or None for scales that go another way."""
    n, k = size
    block: int = attribute(node, "block_size", 0)
    axis = attribute(node, "axis", 1) % 2
    along = 0 if flipped else 1
    if block:
        groups = -(-k // block)
        wanted = (groups, n) if flipped else (n, groups)
        return min(block, k) if axis == along and tuple(scale) == wanted else None
    if math.prod(scale) == 1:
        return k
    return k if axis != along and tuple(scale) == (n,) else None


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """An attribute's value, or ``default``."""
    found = node.attributes.get(name)
    return default if found is None or found.value is None else found.value


def _constant(value: ir.Value) -> bool:
    return value.const_value is not None and not value.is_graph_input()


def tensor_of(value: ir.Value) -> ir.TensorProtocol:
    """The tensor of a constant."""
    assert value.const_value is not None
    return value.const_value


def _array(value: ir.Value) -> np.ndarray:
    return tensor_of(value).numpy()


def _half(codes: Codes) -> bool:
    """Whether scales are finite in float16 without loss."""
    dtype = tensor_of(codes.scale).dtype
    if dtype is _D.FLOAT16 and not (codes.floats and codes.bits == 4):
        return True
    if dtype not in (_D.FLOAT16, _D.FLOAT, _D.FLOAT8E8M0):
        return False
    array = codes.scale_numbers.astype(np.float32)
    with np.errstate(over="ignore"):
        return bool((array.astype(np.float16).astype(np.float32) == array).all())


__all__ = [
    "Codes",
    "attribute",
    "dequantized",
    "heads_of",
    "stacked",
    "tensor_of",
    "unpacked_planes",
    "weights_of",
]
