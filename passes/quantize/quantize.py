"""The pass that quantizes weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from hal.errors import InputError, ModelError
from hal.ir import Graph
from hal.ir.ops import ensure_functions
from hal.passes._edit import remove_unused
from hal.passes.base import Outcome, Pass
from hal.passes.quantize.codes import Codes
from hal.passes.quantize.formats import DATA_FREE, Recipe, Setting
from hal.passes.quantize.hqq import half_quadratic
from hal.passes.quantize.layers import Layer, find_layers, unknown_layer
from hal.passes.quantize.rewrite import put, rounds_activations
from hal.passes.quantize.rtn import round_to_nearest

METADATA_KEY = "quantization"
"""Where the graph's metadata says what was done: see :class:`LayerReport`."""

Progress = Callable[[int, int, str], None]
"""Called before each layer with its number, how many there are and its name."""


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What became of one weight.

    Attributes:
        name: the layer.
        kind: its kind.
        weights: how many numbers it has.
        format: the format's text, or ``float``.
        method: what found the codes; empty for ``float``.
        bits: bits per weight in the bundle, scales included.
        snr_db: ``10 log10(sum w**2 / sum (w - q)**2)``; None for ``float``.
        reason: why it was kept, where it was.
    """

    name: str
    kind: str
    weights: int
    format: str
    method: str
    bits: float
    snr_db: float | None
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Quantize(Pass):
    """Store weights in few bits, as ``DequantizeLinear`` of integer codes.

    Changes results by the rounding of the weights, and of the activations where the format says so;
    everything else is preserved. ``settings`` says it for single layers by name and goes before
    ``recipe``. Weights are taken one at a time.
    """

    name: ClassVar[str] = "quantize"
    recipe: Recipe
    settings: Mapping[str, Setting | None] = dataclasses.field(default_factory=dict)
    progress: Progress | None = None

    def __str__(self) -> str:
        """The pass with its recipe."""
        return f"quantize({self.recipe})"

    def run(self, graph: Graph) -> Outcome:
        """Quantize every layer that the recipe or the settings name.

        Raises:
            InputError: a setting names no layer, or there is nothing to quantize.
            ModelError: a weight holds infinities or NaN.
        """
        layers = find_layers(graph)
        chosen = self._choose(layers)
        reports: list[LayerReport] = []
        before = graph.weight_bytes()
        for index, (layer, setting, reason) in enumerate(chosen):
            if self.progress is not None:
                self.progress(index, len(chosen), layer.name)
            if setting is None:
                reports.append(_kept(layer, reason))
                continue
            weight = matrix(layer)
            codes = quantize_matrix(weight, setting)
            reports.append(_report(layer, setting, weight, codes, reason))
            put(graph, layer, codes)
        remove_unused(graph)
        ensure_functions(graph.model)
        graph.metadata[METADATA_KEY] = _summary(self.recipe, reports)
        count = sum(r.format != "float" for r in reports)
        return Outcome(
            count,
            {
                "recipe": str(self.recipe),
                "bits per weight": f"{graph.metadata[METADATA_KEY]['bits_per_weight']:.2f}",
                "weights": f"{graph.weight_bytes() / before:.1%} of the bytes",
            },
        )

    def _choose(self, layers: list[Layer]) -> list[tuple[Layer, Setting | None, str]]:
        names = {layer.name for layer in layers}
        for name in self.settings:
            if name not in names:
                raise InputError(f"no layer {name!r} in the model", unknown_layer(name, layers))
        chosen = [(layer, *self._setting(layer)) for layer in layers]
        if not any(setting is not None for _, setting, _ in chosen):
            raise InputError(
                f"quantize={str(self.recipe)!r}: the model has no weights for it",
                "weights are matrices of products, embeddings and experts with at least 4,096"
                " elements",
            )
        return chosen

    def _setting(self, layer: Layer) -> tuple[Setting | None, str]:
        if layer.name in self.settings:
            return self.settings[layer.name], ""
        if layer.routes:
            return None, "its result chooses what is computed"
        setting = self.recipe.setting(layer.kind)
        if setting is None:
            return None, "the recipe keeps it"
        form = setting.format
        if form.activations == 8 and not rounds_activations(layer, form.group):
            why = (
                f"inputs of {layer.shape[-1]} are no whole blocks of {form.group}"
                if layer.products
                else ""
            )
            form = dataclasses.replace(form, activations=16)
            return dataclasses.replace(setting, format=form), why
        return setting, ""


def matrix(layer: Layer) -> np.ndarray:
    """A layer's weight as float32 ``[R, C]``, C being the input axis.

    Raises:
        ModelError: it holds infinities or NaN.
    """
    assert layer.weight.const_value is not None
    array = np.asarray(layer.weight.const_value.numpy(), np.float32)
    array = array.T if layer.across else array.reshape(-1, array.shape[-1])
    array = np.ascontiguousarray(array)
    if not np.isfinite(array).all():
        raise ModelError(
            f"weight {layer.weight.name!r} of {layer.name!r} holds infinities or NaN",
            "the model is damaged; a layer is left as it is with its name = 'float' in a plan",
        )
    return array


def quantize_matrix(weight: np.ndarray, setting: Setting) -> Codes:
    """Codes for a matrix ``[R, C]`` by a method that looks at nothing else.

    Raises:
        InputError: the method needs calibration.
    """
    if setting.method == "rtn":
        return round_to_nearest(weight, setting.format)
    if setting.method == "hqq":
        return half_quadratic(weight, setting.format)
    raise InputError(
        f"method {setting.method!r} needs calibration data",
        f"give some, or use {' or '.join(DATA_FREE)}",
    )


def _kept(layer: Layer, reason: str) -> LayerReport:
    assert layer.weight.dtype is not None
    bits = float(layer.weight.dtype.itemsize * 8)
    return LayerReport(layer.name, layer.kind, layer.size, "float", "", bits, None, reason)


def _report(
    layer: Layer, setting: Setting, weight: np.ndarray, codes: Codes, reason: str
) -> LayerReport:
    error = weight - codes.dequantized()
    noise = float(np.vdot(error, error))
    signal = float(np.vdot(weight, weight))
    snr = 10 * np.log10(signal / noise) if noise and signal else None
    return LayerReport(
        layer.name,
        layer.kind,
        layer.size,
        str(setting.format),
        setting.method,
        8 * codes.nbytes / weight.size,
        None if snr is None else round(float(snr), 2),
        reason,
    )


def _summary(recipe: Recipe, reports: list[LayerReport]) -> dict[str, Any]:
    total = sum(r.weights for r in reports)
    return {
        "recipe": str(recipe),
        "bits_per_weight": sum(r.bits * r.weights for r in reports) / max(total, 1),
        "layers": [dataclasses.asdict(r) for r in reports],
    }
