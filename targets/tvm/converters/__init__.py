"""The converter table: one function for each ONNX op, by family."""

from __future__ import annotations

import onnx_ir as ir

from hal.ir import HAL_DOMAIN
from hal.targets.tvm.converters import (
    attention,
    cache,
    cast,
    convolution,
    elementwise,
    hal_ops,
    index,
    matmul,
    nn,
    norm,
    quantize,
    quantized,
    recurrent,
    reduce,
    rest,
    shape,
    slicing,
)
from hal.targets.tvm.dims import Refused
from hal.targets.tvm.lowering import Converter
from hal.targets.tvm.own_ops import DOMAIN

_FAMILIES = (
    elementwise,
    cast,
    shape,
    slicing,
    reduce,
    matmul,
    index,
    norm,
    quantize,
    attention,
    recurrent,
    nn,
    rest,
)

CONVERTERS: dict[tuple[str, str], Converter] = (
    {("", name): function for family in _FAMILIES for name, function in family.CONVERTERS.items()}
    | {
        (HAL_DOMAIN, name): function
        for family in (hal_ops, cache)
        for name, function in family.CONVERTERS.items()
    }
    | {
        (DOMAIN, name): function
        for family in (quantized, convolution)
        for name, function in family.CONVERTERS.items()
    }
)
"""Converters by domain and op type."""


def find(node: ir.Node) -> Converter:
    """The converter of ``node``.

    Raises:
        Refused: there is none.
    """
    domain = "" if node.domain == "ai.onnx" else node.domain
    converter = CONVERTERS.get((domain, node.op_type))
    if converter is None:
        raise Refused(f"no converter for {domain + '::' if domain else ''}{node.op_type}")
    return converter
