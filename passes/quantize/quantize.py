"""The pass that quantizes weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from hal.errors import InputError, ModelError
from hal.ir import Graph
from hal.ir.ops import ensure_functions
from hal.passes._edit import remove_unused
from hal.passes.base import Outcome, Pass
from hal.passes.quantize.awq import search_scales, weighted_rounding
from hal.passes.quantize.calibration import Calibration, Statistics
from hal.passes.quantize.codes import Codes, joined, no_scales
from hal.passes.quantize.convolutions import put_convolution
from hal.passes.quantize.experts import down_statistics, gate_up_statistics, is_down
from hal.passes.quantize.finished import Finished
from hal.passes.quantize.folding import fold, foldable
from hal.passes.quantize.formats import DATA_FREE, KINDS, SCALING, Recipe, Setting
from hal.passes.quantize.gptq import gptq
from hal.passes.quantize.hqq import half_quadratic
from hal.passes.quantize.layers import Layer, find_layers, unknown_layer
from hal.passes.quantize.rewrite import exchange, put
from hal.passes.quantize.rotate import Turned, rotate
from hal.passes.quantize.rtn import round_to_nearest
from hal.passes.quantize.smooth import SAMPLE, search_strength
from hal.passes.quantize.static import Kernels, Measured, apply, measure, pools_of_means
from hal.passes.quantize.streaming import Seen, Streaming, find_stages, inputs_of, looked_up
from hal.passes.quantize.suited import suited
from hal.passes.quantize.unbiased import unbiased

METADATA_KEY = "quantization"
"""Where the graph's metadata says what was done: see :class:`LayerReport`."""

_LOOKED_UP = 1.0
"""Part that an error of a weight itself has, beside one of its product, if it is looked up too."""

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
    ``recipe``. Weights are taken one at a time. Static activations are coded as ``kernels`` read
    them, by what was ``measured`` on the graph before, or is now.
    """

    name: ClassVar[str] = "quantize"
    recipe: Recipe
    settings: Mapping[str, Setting | None] = dataclasses.field(default_factory=dict)
    progress: Progress | None = None
    calibration: Calibration | None = None
    kernels: Kernels = dataclasses.field(default_factory=Kernels)
    measured: Measured | None = None

    def __str__(self) -> str:
        """The pass with its recipe."""
        return f"quantize({self.recipe})"

    def run(self, graph: Graph) -> Outcome:
        """Quantize every layer that the recipe or the settings name.

        Raises:
            InputError: a setting names no layer, or there is nothing to quantize.
            ModelError: a weight holds infinities or NaN.
        """
        if self.calibration is not None:
            self.calibration.check(graph)
        before = graph.weight_bytes()
        turned = rotate(graph) if self._turns() else None
        layers = find_layers(graph)
        chosen = self.choose(layers, turned)
        work = _Work(graph, self, len(chosen))
        looking: dict[str, tuple[Layer, Setting, str]] = {}
        static: list[tuple[Layer, Setting]] = []
        for layer, setting, reason in chosen:
            if setting is None:
                work.keep(layer, reason)
            elif setting.format.static:
                static.append((layer, setting))
            elif setting.method in DATA_FREE or not inputs_of(layer):
                if layer.stacked and setting.method not in DATA_FREE:
                    reason = reason or "a matrix for each head is rounded to nearest"
                work.quantize(layer, _data_free(setting, self.calibration), reason)
            else:
                looking[layer.name] = layer, setting, reason
                if self.calibration is None:
                    raise _needs_data(setting)
        if looking:
            self._calibrated(work, looking)
        facts = self._static(work, static) if static else {}
        reports = [work.reports[layer.name] for layer in layers]
        remove_unused(graph)
        ensure_functions(graph.model)
        graph.metadata[METADATA_KEY] = _summary(self.recipe, reports) | facts
        count = sum(r.format != "float" for r in reports)
        details = {
            "recipe": str(self.recipe),
            "bits per weight": f"{graph.metadata[METADATA_KEY]['bits_per_weight']:.2f}",
            "weights": f"{graph.weight_bytes() / before:.1%} of the bytes",
        }
        if turned is not None:
            details["rotated"] = graph.metadata[METADATA_KEY]["rotated"] = str(turned)
        return Outcome(count, details)

    def _turns(self) -> bool:
        """Whether residual streams are to be turned."""
        settings = [self.recipe.setting(kind) for kind in KINDS] + list(self.settings.values())
        return any(setting is not None and setting.rotate for setting in settings)

    def _calibrated(self, work: _Work, looking: Mapping[str, tuple[Layer, Setting, str]]) -> None:
        """Quantize the layers whose methods look at data."""
        assert self.calibration is not None
        stages = find_stages(work.graph, [layer for layer, _, _ in looking.values()])
        for layer, setting, _ in looking.values():
            if looked_up(layer):
                work.prepare(layer, setting)

        together = {layer.name: stage.layers for stage in stages for layer in stage.layers}

        def visit(layer: Layer, seen: Seen) -> None:
            _, setting, reason = looking[layer.name]
            if layer is together[layer.name][0] and setting.method in SCALING:
                work.scale([looking[other.name][:2] for other in together[layer.name]], seen)
            work.quantize(layer, setting, reason, seen)

        correct = any(setting.method == "gptq" for _, setting, _ in looking.values())
        Streaming(work.graph, self.calibration, stages, correct, work.original).run(visit)

    def _static(self, work: _Work, chosen: list[tuple[Layer, Setting]]) -> dict[str, Any]:
        """Give layers and what lies between them static codes; facts about them."""
        assert self.calibration is not None
        layers = [layer for layer, _ in chosen]
        weights = {layer.name: matrix(layer) for layer in layers}
        pools_of_means(work.graph)
        ensure_functions(work.graph.model)
        measured = self.measured
        if measured is None or not measured.covers(work.graph, layers):
            work.tell("static activations")
            measured = measure(work.graph, layers, self.calibration, self.kernels)
        applied = apply(work.graph, layers, measured, self.kernels)
        for layer, setting in chosen:
            work.take(layer, setting, weights[layer.name], applied.codes[layer.name])
        return {"static": applied.facts}

    def choose(
        self, layers: list[Layer], turned: Turned | None = None
    ) -> list[tuple[Layer, Setting | None, str]]:
        """Each layer's setting, None for float, and why it does not get what was asked for.

        Raises:
            InputError: a setting names no layer, nothing is to be quantized, or data is missing.
        """
        names = {layer.name for layer in layers}
        for name in self.settings:
            if name not in names:
                raise InputError(f"no layer {name!r} in the model", unknown_layer(name, layers))
        basis = frozenset() if turned is None else turned.basis
        chosen = [(layer, *self._setting(layer, basis)) for layer in layers]
        asked = [self.recipe.setting(layer.kind) for layer in layers]
        if layers and not any([*asked, *self.settings.values()]):
            raise InputError(
                f"quantize={str(self.recipe)!r} keeps all {len(layers)} layers as they are",
                "leave it out, or name a format such as w4a16",
            )
        if not any(setting is not None for _, setting, _ in chosen):
            raise InputError(
                f"quantize={str(self.recipe)!r}: the model has no weights for it",
                "weights are matrices of products, embeddings, experts and convolutions with at"
                " least 4,096 elements",
            )
        static = sum(setting is not None and setting.format.static for _, setting, _ in chosen)
        if static and self.calibration is None:
            raise InputError(
                f"{static} layers get static activations, whose ranges are found on data, and none"
                " is given",
                "add calibration (--calibration): images or an .npz; or quantize only the weights"
                " of convolutions: w8a8,conv=w8a16",
            )
        return chosen

    def _setting(self, layer: Layer, basis: frozenset[str]) -> tuple[Setting | None, str]:
        if layer.name in self.settings:
            named = self.settings[layer.name]
            if named is None or not (layer.kind == "conv" or named.format.static):
                return named, ""
            return suited(layer, named)
        if layer.routes:
            return None, "its result chooses what is computed"
        kind = "head" if layer.weight.name in basis else layer.kind
        setting = self.recipe.setting(kind)
        if setting is None:
            return None, "the recipe keeps it"
        return suited(layer, setting)


def shared(kind: str, layers: Sequence[Layer]) -> bool:
    """Whether the embedding's weight is the head's, which then says what it gets."""
    return kind == "embedding" and any(x.kind == "head" and looked_up(x) for x in layers)


def matrix(layer: Layer) -> np.ndarray:
    """A layer's weight as float32 ``[R, C]``, C being the input axis.

    Raises:
        ModelError: it holds infinities or NaN.
    """
    assert layer.weight.const_value is not None
    array = np.asarray(layer.weight.const_value.numpy(), np.float32)
    array = np.ascontiguousarray(layer.matrix(array))
    if not np.isfinite(array).all():
        raise ModelError(
            f"weight {layer.weight.name!r} of {layer.name!r} holds infinities or NaN",
            "the model is damaged; a layer is left as it is with its name = 'float' in a plan",
        )
    return array


def quantize_matrix(
    weight: np.ndarray, setting: Setting, statistics: Statistics | None = None
) -> Codes:
    """Codes for a matrix ``[R, C]``.

    Raises:
        InputError: the method needs calibration.
    """
    if setting.method == "rtn":
        return unbiased(round_to_nearest(weight, setting.format), weight)
    if setting.method == "hqq":
        return unbiased(half_quadratic(weight, setting.format), weight)
    if statistics is None:
        raise _needs_data(setting)
    if setting.method in SCALING:
        codes = weighted_rounding(weight, setting.format, statistics.gram)
        return unbiased(codes, weight, np.diagonal(statistics.gram))
    return gptq(weight, setting.format, statistics)


class _Work:
    """Layers quantized one at a time, with reports of them."""

    def __init__(self, graph: Graph, quantize: Quantize, count: int) -> None:
        self.graph, self.reports = graph, dict[str, LayerReport]()
        self.original = graph.clone()
        self._scales: dict[str, np.ndarray] = {}
        self._gate_up: dict[ir.Node, tuple[Layer, Codes]] = {}
        self._progress, self._count = quantize.progress, count
        calibration = quantize.calibration
        self._finished = Finished(
            calibration.folder if calibration is not None else None,
            calibration.digest() if calibration is not None and calibration.folder else "",
        )

    def keep(self, layer: Layer, reason: str) -> None:
        """Leave a layer in floating point."""
        self._begin(layer)
        self.reports[layer.name] = _kept(layer, reason)

    def quantize(
        self, layer: Layer, setting: Setting, reason: str, seen: Seen | None = None
    ) -> None:
        """Quantize a layer, with what it has ``seen`` if the method looks at data."""
        weight = matrix(layer)
        if misfit := no_scales(weight, setting.format):
            self.keep(layer, misfit)
            return
        self._begin(layer)
        key = self._finished.key(layer.name, setting, weight)
        codes = None
        if layer.name in self._scales:
            weight = weight * self._scales[layer.name]
        elif seen is not None:
            codes = self._finished.load(key, setting)
        if codes is None:
            codes = self._solve(layer, setting, weight, seen)
            if seen is not None:
                self._finished.save(key, codes)
        self.reports[layer.name] = _report(layer, setting, weight, codes, reason)
        if layer.kind == "experts" and not is_down(layer):
            self._gate_up[layer.uses[0]] = layer, codes
        if seen is not None and looked_up(layer):
            exchange(layer, codes)
        elif layer.kind == "conv":
            put_convolution(self.graph, layer, codes)
        else:
            put(self.graph, layer, codes)

    def take(self, layer: Layer, setting: Setting, weight: np.ndarray, codes: Codes) -> None:
        """Note a layer that was quantized together with others."""
        self.reports[layer.name] = _report(layer, setting, weight, codes, "")

    def scale(self, stage: Sequence[tuple[Layer, Setting]], seen: Seen) -> None:
        """Make channels of the layers' weights larger and of their common input smaller."""
        method = stage[0][1].method
        if any(s.method != method or looked_up(x) or x.kind == "experts" for x, s in stage):
            return
        value = stage[0][0].products[0].inputs[0]
        readers = {node for layer, _ in stage for node in layer.products}
        node = None if value is None else foldable(value, readers)
        if node is None or any(x.products[0].inputs[0] is not value for x, _ in stage):
            return
        weights, forms = [matrix(x) for x, _ in stage], [s.format for _, s in stage]
        if any(no_scales(weight, form) for weight, form in zip(weights, forms, strict=True)):
            return
        if method == "smooth":
            found = search_strength(weights, forms, seen.sample(SAMPLE))
        else:
            found = search_scales(weights, forms, seen.gram())
        fold(self.graph, node, found)
        seen.divide(found)
        self._scales |= {layer.name: found for layer, _ in stage}

    def _solve(
        self, layer: Layer, setting: Setting, weight: np.ndarray, seen: Seen | None
    ) -> Codes:
        if seen is None:
            return quantize_matrix(weight, setting)
        if layer.kind == "experts":
            return self._experts(layer, setting, weight, seen)
        if setting.method in SCALING:
            return quantize_matrix(weight, setting, Statistics(seen.gram()))
        form = setting.format
        rounding = form.group if form.activations == 8 else None
        statistics = seen.statistics(layer, weight, rounding)
        if looked_up(layer):
            statistics = statistics.with_white(_LOOKED_UP)
        return quantize_matrix(weight, setting, statistics)

    def _experts(self, layer: Layer, setting: Setting, weight: np.ndarray, seen: Seen) -> Codes:
        """Each expert by what it sees; those that no token chose by their weights alone."""
        routed, found = seen.routed(), []
        count = layer.shape[0]
        node = layer.uses[0]
        pairs = None
        if is_down(layer):
            gate_up, codes = self._before_down(node)
            quantized = gate_up if codes is None else codes.dequantized()
            pairs = list(zip(np.split(gate_up, count), np.split(quantized, count), strict=True))
        activation = node.attributes.get_string("activation", "silu")
        for expert, part in enumerate(np.split(weight, count)):
            statistics: Statistics | None
            if pairs is None:
                statistics = gate_up_statistics(routed, part, expert)
            else:
                statistics = down_statistics(routed, part, expert, *pairs[expert], activation)
            free = dataclasses.replace(setting, method="rtn") if statistics is None else setting
            found.append(quantize_matrix(part, free, statistics))
        return joined(found)

    def _before_down(self, node: ir.Node) -> tuple[np.ndarray, Codes | None]:
        """The float first matrices of a mixture of experts, and what they were quantized to."""
        if node in self._gate_up:
            layer, codes = self._gate_up[node]
            return matrix(layer), codes
        tensor = node.inputs[3].const_value if node.inputs[3] is not None else None
        assert tensor is not None
        array = np.asarray(tensor.numpy(), np.float32)
        return array.reshape(-1, array.shape[-1]), None

    def prepare(self, layer: Layer, setting: Setting) -> None:
        """Round a weight that is looked up as well as multiplied: its look-up comes first."""
        weight = matrix(layer)
        if not no_scales(weight, setting.format):
            put(self.graph, layer, round_to_nearest(weight, setting.format))

    def _begin(self, layer: Layer) -> None:
        self.tell(layer.name)

    def tell(self, what: str) -> None:
        """Say what is being worked on."""
        if self._progress is not None:
            self._progress(len(self.reports), self._count, what)


def _data_free(setting: Setting, calibration: Calibration | None) -> Setting:
    """The method for a layer without inputs to look at."""
    if setting.method in DATA_FREE:
        return setting
    if calibration is None:
        raise _needs_data(setting)
    return dataclasses.replace(setting, method="rtn")


def _needs_data(setting: Setting) -> InputError:
    return InputError(
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
    noise = codes.noise(weight)
    signal = float(np.vdot(weight, weight))
    snr = 10 * np.log10(signal / noise) if noise and signal else None
    return LayerReport(
        layer.name,
        layer.kind,
        layer.size,
        str(setting.format),
        setting.how,
        8 * codes.nbytes / weight.size,
        None if snr is None else round(float(snr), 2),
        reason,
    )


def _summary(recipe: Recipe, reports: list[LayerReport]) -> dict[str, Any]:
    total = sum(r.weights for r in reports)
    return {
        "recipe": str(recipe),
        "bits_per_weight": sum(r.bits * r.weights for r in reports) / max(total, 1),
        "activations": 8 if any("a8" in r.format for r in reports) else 16,
        "layers": [dataclasses.asdict(r) for r in reports],
    }
