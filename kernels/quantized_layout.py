"""How quantized weights lie in memory for the matrix kernels, and packing them so with NumPy.

Columns of the result (rows of the weight matrix) are taken in blocks of ``tiles * lanes``; a block
walks the groups of one scale along K one after the other, so a kernel reads one stream:

    [column block][group][ codes | scales | zero points ]

Codes of a group come in 32-bit words, one for each column, ``[step][word][tile][lane]``; a word
holds four bytes, which belong to four neighbours along K, and a byte several codes, which lie four
apart along K. So masking and shifting words gives the operands of a 4-way dot product. Eight-bit
codes for float activations are ``[step][4][tile][lane]`` bytes instead, which widen in one step.
Three bits are planes: two words of the low two bits, one of the high bit. Scales are float16,
zero points one byte each.

Codes may be small floats. Those of 4 bits (E2M1), doubled, are integers from -12 to 12; there are
15 of them, and their number in that order, from -7 to 7, is stored like a 4-bit integer. Those of
8 bits (E4M3) are stored as they are.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from hal.descriptor import Descriptor

BITS = (8, 4, 3, 2)
"""Widths of codes that there is a layout for."""

_CHUNK = 64
"""Column blocks that are packed at a time, to bound the memory that packing takes."""


@dataclasses.dataclass(frozen=True)
class Dot:
    """A dot product that the chip offers: ``acc[lane] += sum of k products of bytes``.

    ``signed`` says whether the weights' bytes are signed (the activations' always are).
    """

    llvm: str
    lanes: int
    k: int = 4
    signed: bool = False


def byte_dot(descriptor: Descriptor) -> Dot | None:
    """The widest dot product of four bytes that the chip offers with a name for LLVM, or None."""
    kinds = (("u8", "i8", "i32"), ("i8", "i8", "i32"))
    found = [
        Dot(i.llvm, i.lanes, i.k, signed=i.types == kinds[1])
        for i in descriptor.offered()
        if i.does == "dot" and i.k == 4 and i.types in kinds and i.llvm and not i.scalable
    ]
    return max(found, key=lambda dot: dot.lanes, default=None)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A weight matrix ``[n, k]`` of ``bits``-bit codes with a scale for ``group`` of them along K.

    ``group`` is at most ``k``, and need not divide it. ``zeros``: there is a zero point beside each
    scale. ``integer``: for int8 activations; ``signed``: the dot product takes signed weights.
    ``floats``: codes are floats, of 4 bits (then scales belong to the doubled ones) or of 8 (not
    for int8 activations).
    """

    n: int
    k: int
    bits: int
    group: int
    lanes: int
    zeros: bool = False
    integer: bool = False
    signed: bool = False
    tiles: int = 1
    floats: bool = False

    @property
    def step(self) -> int:
        """Codes of one column in the words that are read together."""
        return {8: 4, 4: 8, 3: 32, 2: 16}[self.bits]

    @property
    def words(self) -> int:
        """Words of one column in a step."""
        return 3 if self.bits == 3 else 1

    @property
    def steps(self) -> int:
        """Steps in a group."""
        return -(-self.group // self.step)

    @property
    def padded_group(self) -> int:
        """Elements of a group as stored; those past ``group`` multiply zeros."""
        return self.steps * self.step

    @property
    def groups(self) -> int:
        """Groups along K; the last one may be shorter."""
        return -(-self.k // self.group)

    @property
    def padded_k(self) -> int:
        """Elements of a row of activations as the kernel reads them."""
        return self.groups * self.padded_group

    @property
    def columns(self) -> int:
        """Columns in a block."""
        return self.tiles * self.lanes

    @property
    def blocks(self) -> int:
        """Blocks of columns; the last one may have columns that stand for nothing."""
        return -(-self.n // self.columns)

    @property
    def padded_n(self) -> int:
        """Columns as stored."""
        return self.blocks * self.columns

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of a group of a block."""
        return self.steps * self.words * self.columns * 4

    @property
    def group_bytes(self) -> int:
        """Bytes of a group of a block: codes, scales, zero points."""
        return self.code_bytes + self.columns * (3 if self.zeros else 2)

    @property
    def bytes(self) -> int:
        """Bytes of the whole matrix."""
        return self.blocks * self.groups * self.group_bytes

    @property
    def wide_bytes(self) -> bool:
        """Whether codes lie byte by byte, to be widened to float."""
        return self.bits == 8 and not self.integer

    @property
    def signed_bytes(self) -> bool:
        """Whether codes (and zero points) are stored as signed bytes."""
        return self.bits == 8 and (self.signed or not self.integer)

    @property
    def offset(self) -> int:
        """What is added to a signed code to store it; without zero points the kernel takes it off.

        Codes below 8 bits are stored unsigned, since both kinds of dot product take them so.
        """
        if self.floats:
            return 12 if self.bits == 4 else 0
        return 0 if self.signed_bytes else 1 << (self.bits - 1)


def pack(
    layout: Layout, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None = None
) -> np.ndarray:
    """Bytes ``uint8 [layout.bytes]`` of a weight matrix.

    Args:
        layout: where everything goes.
        codes: ``[n, k]``, signed without ``zeros`` and unsigned with them; for floats the numbers
            of :func:`float_numbers` (4 bits), or their bits (8 bits), as int8.
        scales: ``[n, groups]``, stored as float16.
        zeros: zero points ``[n, groups]``, where the layout has them.
    """
    result = np.empty((layout.blocks, layout.groups, layout.group_bytes), np.uint8)
    for first in range(0, layout.blocks, _CHUNK):
        last = min(first + _CHUNK, layout.blocks)
        rows = slice(first * layout.columns, last * layout.columns)
        part = result[first:last]
        part[..., : layout.code_bytes] = _codes(layout, codes[rows], last - first)
        tail = part[..., layout.code_bytes :]
        tail[..., : 2 * layout.columns] = _beside(
            layout, scales[rows].astype(np.float16), last - first
        )
        if zeros is not None:
            stored = _stored(layout, zeros[rows], unsigned=True)
            tail[..., 2 * layout.columns :] = _beside(layout, stored, last - first)
    return result.reshape(-1)


def _stored(layout: Layout, codes: np.ndarray, *, unsigned: bool) -> np.ndarray:
    """Codes (or zero points) as the bytes that are stored."""
    offset = (8 if layout.bits == 4 else 0) if layout.floats else layout.offset
    shift = offset - (1 << (layout.bits - 1) if unsigned else 0)
    return (codes.astype(np.int16) + shift).astype(np.uint8)


def float_numbers(values: np.ndarray) -> np.ndarray:
    """Where numbers that E2M1 has are among them: int8, from -7 for -6 to 7 for 6."""
    magnitude = np.searchsorted(_E2M1, np.abs(values))
    return np.where(values < 0, -magnitude, magnitude).astype(np.int8)


_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def _beside(layout: Layout, values: np.ndarray, blocks: int) -> np.ndarray:
    """Bytes of scales or zero points ``[rows, groups]`` as ``[blocks, groups, bytes]``."""
    padded = np.zeros((blocks * layout.columns, layout.groups), values.dtype)
    padded[: len(values)] = values
    ordered = padded.reshape(blocks, layout.columns, layout.groups).transpose(0, 2, 1)
    return np.ascontiguousarray(ordered).view(np.uint8)


def _codes(layout: Layout, codes: np.ndarray, blocks: int) -> np.ndarray:
    """Bytes of codes ``[rows, k]`` as ``[blocks, groups, code_bytes]``."""
    stored = _stored(layout, codes, unsigned=layout.zeros)
    rows = blocks * layout.columns
    whole = np.zeros((rows, layout.groups * layout.group), np.uint8)
    whole[: len(stored), : layout.k] = stored
    padded = np.zeros((rows, layout.groups, layout.padded_group), np.uint8)
    padded[..., : layout.group] = whole.reshape(rows, layout.groups, layout.group)
    shape = (blocks, layout.tiles, layout.lanes, layout.groups, layout.steps, layout.step // 4, 4)
    words = _words(layout.bits, padded.reshape(shape))
    # block, tile, lane, group, step, word, byte
    order = (0, 3, 4, 5, 6, 1, 2) if layout.wide_bytes else (0, 3, 4, 5, 1, 2, 6)
    return np.ascontiguousarray(words.transpose(order)).reshape(blocks, layout.groups, -1)


def _words(bits: int, codes: np.ndarray) -> np.ndarray:
    """Codes ``[..., fours, 4]`` of a step as bytes ``[..., words, 4]``."""
    if bits == 8:
        return codes
    if bits == 3:
        low = _joined(2, codes & 3)
        return np.concatenate([low, _joined(1, codes >> 2)], axis=-2)
    return _joined(bits, codes)


def _joined(bits: int, codes: np.ndarray) -> np.ndarray:
    per_byte = 8 // bits
    split = codes.reshape(*codes.shape[:-2], -1, per_byte, 4)
    parts = [split[..., i, :] << (bits * i) for i in range(per_byte)]
    return functools.reduce(np.bitwise_or, parts)


# -- references -----------------------------------------------------------------------------------


def dequantized(
    codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, group: int
) -> np.ndarray:
    """``(codes - zeros) * scales`` in float32, blocks of ``group`` along the last axis."""
    spread = np.arange(codes.shape[-1]) // group
    values = codes.astype(np.int32)
    if zeros is not None:
        values = values - zeros.astype(np.int32)[..., spread]
    return values.astype(np.float32) * scales.astype(np.float32)[..., spread]


def rounded(x: np.ndarray, group: int, bits: int = 8) -> np.ndarray:
    """Activations rounded to ``bits`` in blocks of ``group`` along the last axis, as floats."""
    size = x.shape[-1]
    padded = np.zeros((*x.shape[:-1], -(-size // group) * group), np.float32)
    padded[..., :size] = x
    blocks = padded.reshape(*x.shape[:-1], -1, group)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / np.float32((1 << (bits - 1)) - 1)
    codes = np.rint(blocks / np.where(scale > 0, scale, np.float32(1)))
    return (codes * scale).reshape(padded.shape)[..., :size].astype(np.float32)
