"""Weights of convolutions as codes with one scale for each output channel."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from hal.ir import Graph
from hal.passes._edit import Editor
from hal.passes.quantize.codes import Codes, pack
from hal.passes.quantize.formats import Format
from hal.passes.quantize.layers import Layer

_SHRINK = tuple(np.linspace(1.0, 0.75, 11))


def by_channel(
    weight: np.ndarray,
    form: Format,
    least: np.ndarray | None = None,
    highest: int = 127,
    dtype: type[np.floating] = np.float32,
) -> Codes:
    """Symmetric 8-bit codes of ``[N, K]``, a scale of ``dtype`` for each row.

    Of several scales the one with the least squared error is taken. ``least`` ``[N]`` are scales
    that rows must not go below, ``highest`` is the largest code.
    """
    size = np.abs(weight).max(1, initial=0) / np.float32(highest)
    floor = np.full(len(weight), np.finfo(dtype).tiny, np.float32)
    floor = floor if least is None else np.maximum(floor, least.astype(np.float32))
    best = np.full(len(weight), np.inf)
    scale = np.maximum(size, floor).astype(dtype).astype(np.float32)
    for factor in _SHRINK:
        tried = np.maximum(size * np.float32(factor), floor).astype(dtype).astype(np.float32)
        left = weight - _codes(weight, tried, highest) * tried[:, None]
        error = np.square(left).sum(1, dtype=np.float64)
        better = error < best
        best[better], scale[better] = error[better], tried[better]
    codes = _codes(weight, scale, highest).astype(np.int8)
    return Codes(form, codes, scale[:, None].astype(dtype))


def _codes(weight: np.ndarray, scale: np.ndarray, highest: int) -> np.ndarray:
    result: np.ndarray = np.clip(np.rint(weight / scale[:, None]), -highest, highest)
    return result


def put_convolution(graph: Graph, layer: Layer, codes: Codes) -> None:
    """Replace the weight of a convolution by ``codes`` ``[N, K]``, decoded in the graph."""
    edit = Editor(graph)
    edit.at(next(node for node in graph.nodes() if node in layer.uses))
    weight = decoded(edit, layer, codes)
    for node in layer.uses:
        node.replace_input_with(1, weight)


def decoded(edit: Editor, layer: Layer, codes: Codes) -> ir.Value:
    """``DequantizeLinear`` of ``codes`` in the shape that the convolution reads."""
    base, rows = layer.weight.name or layer.name, len(codes.codes)
    stored = pack(layer.stored(codes.codes), codes.format.dtype, layer.shape)
    scale = ir.tensor(codes.scale.astype(np.float32).reshape(rows))
    inputs = [edit.tensor(stored, f"{base}.codes"), edit.tensor(scale, f"{base}.scale")]
    if codes.zero is not None:
        zero = pack(codes.zero, codes.format.dtype, (rows,))
        inputs.append(edit.tensor(zero, f"{base}.zero"))
    dtype = layer.weight.dtype or ir.DataType.FLOAT
    attributes = {"axis": 1 if layer.across else 0}
    if dtype is not ir.DataType.FLOAT:
        attributes["output_dtype"] = dtype.value
    weight = edit.op("DequantizeLinear", inputs, attributes)
    weight.type, weight.shape = ir.TensorType(dtype), ir.Shape(layer.shape)
    return weight


__all__ = ["by_channel", "decoded", "put_convolution"]
