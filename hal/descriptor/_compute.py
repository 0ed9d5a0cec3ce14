"""What the arithmetic units offer: vectors, and instructions a kernel template may ask for."""

from __future__ import annotations

import re

from pydantic import Field

from hal.descriptor._base import Model
from hal.descriptor._dtypes import DTypeName, dtype_bits
from hal.descriptor._quantity import IssueRate


class Vector(Model):
    """The vector unit. ``bits = 0`` says there is none."""

    bits: int = Field(default=0, ge=0)
    """Width of a register; the guaranteed minimum where it is not fixed."""
    registers: int | None = Field(default=None, gt=0)
    """How many architectural vector registers there are."""
    scalable: bool = False
    """Whether the width is only known at run time."""
    lanes: dict[DTypeName, int] = Field(default_factory=dict)
    """Exceptions to ``bits / width of the dtype``."""

    def lanes_of(self, dtype: str) -> int:
        """Elements of ``dtype`` in one register, at least 1."""
        if dtype in self.lanes:
            return self.lanes[dtype]
        width = dtype_bits(dtype)
        return max(1, self.bits // width) if width else 1


class Instruction(Model):
    """An instruction by what it does, not by what it is called.

    ``dot``: ``acc[lane] += sum over k of lhs[lane, k] * rhs[lane, k]``; ``types`` are those of
    lhs, rhs and acc. ``fma``: ``dot`` with k = 1. ``matrix``: a tile product, ``lanes`` being the
    elements of its result. Sums are exact (modulo the width of acc): what saturates on the way is
    ``dot_saturating``, which no kernel takes for a dot product.
    """

    does: str = Field(min_length=1)
    lanes: int = Field(gt=0)
    """Accumulators (elements of the result) per instruction."""
    k: int = Field(default=1, gt=0)
    """Products that go into each accumulator."""
    types: tuple[str, ...] = ()
    """Element types of the operands, result last: ``["u8", "i8", "i32"]``."""
    scalable: bool = False
    """Whether operands are as long as registers turn out to be; ``lanes`` is the least then."""
    llvm: str | None = None
    """Name of the LLVM intrinsic, where there is one."""
    llvm_features: tuple[str, ...] = ()
    """LLVM target attributes that the intrinsic needs, e.g. ``["+name"]``."""
    requires: tuple[str, ...] = ()
    """Features the chip must list; without them the instruction is not offered."""
    vector_bits: int = Field(default=0, ge=0)
    """Least width of the chip's vectors, where the instruction needs more than its result fills."""
    rate: IssueRate = None
    """Instructions per cycle and core."""

    @property
    def result_bits(self) -> int:
        """Bits of all accumulators together; 0 where no types are given."""
        digits = re.search(r"\d+", self.types[-1]) if self.types else None
        return self.lanes * int(digits.group()) if digits else 0

    @property
    def operations(self) -> int:
        """Arithmetic operations of one instruction (a multiply-add counts as two)."""
        return 2 * self.lanes * self.k
