"""The cache ops of the ``hal`` domain: pools that are written in place and read by pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import tirx

from hal.kernels import cache as kernels
from hal.kernels.attention_plan import Attention
from hal.targets.tvm.converters.plain_cache import plain_attention
from hal.targets.tvm.dims import Refused
from hal.targets.tvm.lowering import Op, Operand

_FLOAT = frozenset({ir.DataType.FLOAT})
_HALF = frozenset({ir.DataType.FLOAT16})


def _static(operand: Operand, axis: int, what: str) -> int:
    extent = operand.shape[axis]
    if not isinstance(extent, int):
        raise Refused(f"{what} must be known at compile time")
    return extent


def write(op: Op) -> Operand:
    """``hal::CacheWrite``: the pool is one of the program's inputs, and is changed in place."""
    pool, update, table, lengths = op.inputs()
    heads = _static(pool, 1, "the heads of a pool")
    channels = _static(pool, 3, "the channels of a pool")
    make = kernels.scatter if op.context.shaping.plain else kernels.write
    kernel = make(heads, channels, pool.stored)
    return op.context.call_in_place(kernel, [pool, update, table, lengths], "cache_write")


def attention(op: Op) -> Operand:
    """``hal::CachedAttention`` on float32 queries."""
    op.require(0, _FLOAT)
    if op.context.shaping.plain:
        return plain_attention(op)
    recent = int(op.attribute("recent", 0))
    bits = int(op.attribute("bits", 0))
    whole = _Source(op, (1, 2, 3, 4), bits, lag=recent, window=int(op.attribute("window", 0)))
    if not recent:
        return whole.attend()[0]
    late = _Source(op, (7, 8, 9, 10), 0, window=recent, partial=True)
    (old, old_sums), (new, new_sums) = whole.attend(), late.attend()

    def merged(a: Any, a_sums: Any, b: Any, b_sums: Any, i: Any) -> Any:
        row = i[:3]
        top = tirx.max(a_sums(*row), b_sums(*row))
        wa, wb = tirx.exp(a_sums(*row) - top), tirx.exp(b_sums(*row) - top)
        return (a(*i) * wa + b(*i) * wb) / (wa + wb)

    return op.compute(old.shape, merged, old, old_sums, new, new_sums)


class _Source:
    """Pools to attend over: where the operands are, and which positions are seen."""

    def __init__(
        self,
        op: Op,
        places: tuple[int, int, int, int],
        bits: int,
        *,
        window: int,
        lag: int = 0,
        partial: bool = False,
    ) -> None:
        self.op, self.bits = op, bits
        q, (keys, values, table, lengths) = op.input(0), (op.input(i) for i in places)
        shared = int(op.attribute("value_size", 0))
        heads, channels = _static(q, 1, "heads"), _static(q, 3, "channels")
        stored = _static(values, 3, "channels of a pool") * (2 if bits == 4 else 1)
        embed = op.context.embed
        scales = [embed(np.zeros((1, 1, 1, 1), np.float16))] * 2
        if bits:
            scales = [op.require(5, _HALF), op.require(6, _HALF)]
        self.spec = Attention(
            heads=heads,
            kv_heads=_static(keys, 1, "the heads of a pool"),
            channels=channels,
            value_channels=shared or stored,
            scale=float(op.attribute("scale", 1.0)),
            softcap=float(op.attribute("softcap", 0.0)),
            window=window,
            bits=bits,
            block=channels // _static(scales[0], 3, "scales of a pool") if bits else 1,
            lag=lag,
            partial=partial or lag > 0,
            shared=bool(shared),
            lanes=op.context.shaping.lanes,
            cores=op.context.shaping.cores,
            registers=op.context.shaping.registers,
        )
        self.operands = [q, keys, values, table, lengths, *scales]

    def attend(self) -> list[Operand]:
        """The result, and the logarithms of the sums."""
        q = self.operands[0]
        sums = list(q.shape[:3]) if self.spec.partial else [1, 1, 1]
        outputs = [([*q.shape[:3], self.spec.value_channels], "float32"), (sums, "float32")]
        kernel = kernels.attention(self.spec)
        return self.op.context.call_kernel(kernel, self.operands, outputs, "cached_attention")


CONVERTERS: dict[str, Callable[[Op], Any]] = {"CacheWrite": write, "CachedAttention": attention}
"""Converters of this family by op type."""
