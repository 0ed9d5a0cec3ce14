"""Quantization: weights in few bits on the neutral graph, in standard ONNX.

One file per method; :class:`Quantize` is the pass, :mod:`.formats` the text that asks for it,
:mod:`.layers` what can be quantized, :mod:`.rewrite` how it looks in the graph afterwards.
"""

from hal.passes.quantize.calibration import Calibration
from hal.passes.quantize.formats import (
    Format,
    Recipe,
    Setting,
    parse_format,
    parse_recipe,
    parse_setting,
)
from hal.passes.quantize.layers import Layer, find_layers
from hal.passes.quantize.quantize import METADATA_KEY, LayerReport, Quantize

__all__ = [
    "METADATA_KEY",
    "Calibration",
    "Format",
    "Layer",
    "LayerReport",
    "Quantize",
    "Recipe",
    "Setting",
    "find_layers",
    "parse_format",
    "parse_recipe",
    "parse_setting",
]
