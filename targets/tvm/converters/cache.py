"""The cache ops of the ``hal`` domain: pools that are written in place and read by pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from hal.kernels import cache as kernels
from hal.targets.tvm.dims import Refused
from hal.targets.tvm.lowering import Op, Operand

_FLOAT = frozenset({ir.DataType.FLOAT})


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
    kernel = kernels.write(heads, channels, pool.stored)
    return op.context.call_in_place(kernel, [pool, update, table, lengths], "cache_write")


def attention(op: Op) -> Operand:
    """``hal::CachedAttention`` on float32 queries."""
    q, keys, values, table, lengths = (op.input(i) for i in range(5))
    op.require(0, _FLOAT)
    bits, shared = int(op.attribute("bits", 0)), int(op.attribute("value_size", 0))
    heads, channels = _static(q, 1, "heads"), _static(q, 3, "channels")
    stored = _static(values, 3, "channels of a pool") * (2 if bits == 4 else 1)
    if shared and bits:
        raise Refused("values that are a prefix of keys in 8 or 4 bits")
    spec = kernels.Attention(
        heads=heads,
        kv_heads=_static(keys, 1, "the heads of a pool"),
        channels=channels,
        value_channels=shared or stored,
        scale=float(op.attribute("scale", 1.0)),
        softcap=float(op.attribute("softcap", 0.0)),
        window=int(op.attribute("window", 0)),
        bits=bits,
        shared=bool(shared),
        lanes=op.context.shaping.lanes,
        cores=op.context.shaping.cores,
    )
    if bits:
        scales = [op.require(5, _FLOAT), op.require(6, _FLOAT)]
    else:
        scales = [op.context.embed(np.zeros((1, 1, 1, 1), np.float32))] * 2
    out = [*q.shape[:3], spec.value_channels]
    operands = [q, keys, values, table, lengths, *scales]
    return op.context.call_kernel(
        kernels.attention(spec), operands, [(out, "float32")], "cached_attention"
    )[0]


CONVERTERS: dict[str, Callable[[Op], Any]] = {"CacheWrite": write, "CachedAttention": attention}
"""Converters of this family by op type."""
