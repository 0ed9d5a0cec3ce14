"""A setting as a layer can have it, and why it gets less than was asked for."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from hal.passes.quantize.chains import heavy_nodes
from hal.passes.quantize.formats import Format, Setting, conv_setting
from hal.passes.quantize.layers import SMALLEST, Layer
from hal.passes.quantize.rewrite import readers_of_input, rounds_activations

_FEWEST = 4
"""Bits that matrices for each head have at least, unless a plan names them: no method sees their
inputs, and a model that was trained for fewer bits was trained without knowing of them."""


def suited(layer: Layer, asked: Setting) -> tuple[Setting | None, str]:
    """``asked`` as ``layer`` can have it, None for float; and a reason where it cannot.

    Raises:
        InputError: convolutions cannot have it at all.
    """
    setting = conv_setting(asked) if layer.kind == "conv" else asked
    assert setting is not None
    form, reason = setting.format, ""
    if layer.stacked and form.bits < _FEWEST:
        form = Format(8, 32, symmetric=True, activations=form.activations)
        reason = f"a matrix for each head: below {_FEWEST} bits, rounding to nearest is not enough"
    if form.static:
        reason = _not_static(layer)
        if not reason:
            return setting, ""
        form = dataclasses.replace(form, static=False)
    if layer.kind == "conv":
        if layer.size < SMALLEST:
            return None, reason or f"{layer.size:,} weights: nothing to gain without activations"
        form = dataclasses.replace(form, activations=16)
    elif form.activations == 8 and not rounds_activations(layer, form.group):
        reason = reason or _keeps_activations(layer, form.group)
        form = dataclasses.replace(form, activations=16)
    return dataclasses.replace(setting, format=form), reason


def _keeps_activations(layer: Layer, group: int) -> str:
    """Why a layer's activations stay as they are; nothing for a table, which has none."""
    if readers_of_input(layer):
        return f"inputs of {layer.shape[-1]} are no whole blocks of {group}"
    return "its inputs are made inside of the mixture" if layer.kind == "experts" else ""


def _not_static(layer: Layer) -> str:
    """Why a layer's activations cannot have static codes, or nothing."""
    if layer.stacked:
        return "it is a matrix for each head"
    nodes = heavy_nodes(layer)
    if not nodes or len(nodes) < len(layer.uses):
        return "it is looked up as well" if layer.kind != "experts" else "experts"
    if any(node.graph is not layer.weight.graph for node in nodes):
        return "it is in a loop or a branch"
    values = [node.inputs[0] for node in nodes]
    if layer.weight.dtype is not ir.DataType.FLOAT or any(
        v is None or v.dtype is not ir.DataType.FLOAT for v in values
    ):
        return "only float32 activations get static codes"
    if any(v is None or v.shape is None for v in values):
        return "the rank of its input is not known"
    return ""


__all__ = ["suited"]
