"""Mixed precision: a format for each layer, so that a budget is met at the fewest bytes.

1. *Sensitivity*: each layer alone is rounded to the lowest format, and the damage to the model's
   result is measured. Other formats are priced by the squared error of the weights, to which the
   damage is proportional as long as it is small.
2. *Choice*: all layers start lowest; the change that buys most damage for its bytes is made next,
   until the predicted damage is below a bound (or the bytes are used up).
3. *Check*: the bound is found by bisection on the real model, rounded as chosen.

The damage is the divergence of a language model's predictions, and one less the cosine of other
outputs.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from hal.errors import CheckFailed, InputError
from hal.ir import Graph
from hal.passes.base import Pipeline
from hal.passes.quantize import Calibration, Quantize, Recipe, Setting, find_layers
from hal.passes.quantize.formats import DATA_FREE, Format
from hal.passes.quantize.layers import Layer
from hal.passes.quantize.quantize import matrix, quantize_matrix
from hal.passes.quantize.static import Kernels, Measured, measure, pools_of_means
from hal.passes.quantize.suited import suited
from hal.quantization.budget import Bound
from hal.quantization.judge import Judge
from hal.quantization.plan import Plan

_CHECKS = 8


@dataclasses.dataclass(frozen=True)
class Choice:
    """A layer in one of its formats.

    Attributes:
        setting: None for float.
        bytes: what the layer takes.
        damage: predicted damage to the result, in the unit of the measure.
    """

    setting: Setting | None
    bytes: int
    damage: float


@dataclasses.dataclass(frozen=True)
class Found:
    """The plan that the search ends with, what it measured, and the layers by their damage."""

    plan: Plan
    figures: Mapping[str, float]
    bytes: int
    notes: Mapping[str, str]
    checks: int
    measured: Measured | None = None


Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Static:
    """What static activations are found on, and the kernels they are for."""

    calibration: Calibration | None = None
    kernels: Kernels = dataclasses.field(default_factory=Kernels)


def search(
    graph: Graph,
    judge: Judge,
    recipe: Recipe,
    ladder: Sequence[Format],
    *,
    held: Mapping[str, Setting | None] | None = None,
    floor: bool = False,
    bounds: Sequence[Bound] = (),
    size: int | None = None,
    static: Static | None = None,
    say: Say = lambda _: None,
) -> Found:
    """The plan with the fewest bytes that meets ``bounds``, or the best within ``size`` bytes.

    Args:
        graph: the float graph.
        judge: measures it on samples.
        recipe: its methods are used, and kinds that it keeps stay floats.
        ladder: formats from low to high; float comes after the last.
        held: layers by name that get what is said here and nothing else.
        floor: the format of a kind that the recipe names is the lowest that is tried for it.
        bounds: on accuracy; all must be met.
        size: bytes that all weights of the model may take.
        static: for layers with static activations; without it their weights alone are rounded.
        say: told what is being done.

    Raises:
        CheckFailed: no plan meets the budget; says the best that was found and the worst layers.
        InputError: nothing of the model can be quantized.
    """
    layers = [layer for layer in find_layers(graph) if not layer.routes]
    if not layers:
        raise InputError("the model has no weights to quantize", "leave the budget out")
    rounding = _Rounding(graph, judge, layers, recipe, static or Static(), say)
    options = {}
    for index, layer in enumerate(layers):
        say(f"sensitivity of layer {index + 1} of {len(layers)}: {layer.name}")
        tried = _settings(layer, recipe, ladder, rounding.static.calibration is not None, floor)
        kept = held is not None and layer.name in held
        if held is not None and kept:
            setting = held[layer.name]
            tried = [] if setting is None else [setting]
        found = _options(layer, judge, tried, rounding)
        options[layer.name] = found[:1] if kept else found
    floats = sum(layer.size * _float_bytes(layer) for layer in layers)
    fixed = graph.weight_bytes() - floats
    trial = _Trial(graph, judge, recipe, layers, options, fixed, rounding, frozenset(held or {}))
    if size is not None:
        return trial.within(size, bounds, say)
    return trial.least(bounds, say)


def _options(
    layer: Layer, judge: Judge, settings: Sequence[Setting], rounding: _Rounding
) -> list[Choice]:
    """The layer's formats from few bytes to float, each with less damage than the one before."""
    weight = matrix(layer)
    floats = weight.size * _float_bytes(layer)
    damage: float | None = None
    base = 0.0
    found: list[Choice] = []
    for setting in settings:
        codes = quantize_matrix(weight, _without_data(setting))
        rounded = codes.dequantized()
        if setting.format.static:
            found.append(Choice(setting, codes.nbytes, rounding.damage(layer, setting)))
            continue
        error = float(np.square(weight - rounded).sum(dtype=np.float64))
        if damage is None:
            base = error
            changed = {layer.weight.name or "": layer.stored(rounded)}
            damage = max(_damage(judge.weights(changed, probe=True)), 0.0)
        found.append(Choice(setting, codes.nbytes, damage * error / base if base else 0.0))
    found.append(Choice(None, floats, 0.0))
    return found


def _settings(
    layer: Layer, recipe: Recipe, ladder: Sequence[Format], static: bool, floor: bool
) -> list[Setting]:
    """The layer's settings from few bytes to many, weights alone after static activations."""
    asked = recipe.setting(layer.kind)
    if asked is None:
        return []
    if layer.kind != "conv":
        lowest = asked.format.bits if floor and layer.kind in recipe.named else 0
        forms = [form for form in ladder if form.bits >= lowest]
        return list(dict.fromkeys(_fitting(layer, recipe, form) for form in forms))
    alone = dataclasses.replace(asked.format, activations=16, static=False)
    tried = [asked] if static or not asked.format.static else []
    tried += [Setting(alone), Setting(dataclasses.replace(alone, bits=8))]
    found = [suited(layer, setting)[0] for setting in tried]
    return list(dict.fromkeys(setting for setting in found if setting is not None))


@dataclasses.dataclass
class _Rounding:
    """Graphs with static activations, from one look at the samples."""

    graph: Graph
    judge: Judge
    layers: list[Layer]
    recipe: Recipe
    static: Static
    say: Say
    measured: Measured | None = None

    def damage(self, layer: Layer, setting: Setting) -> float:
        """What ``layer`` alone does to the result, activations included."""
        names = {other.name: None for other in self.layers}
        return max(_damage(self.figures({**names, layer.name: setting})), 0.0)

    def figures(self, settings: Mapping[str, Setting | None]) -> dict[str, float]:
        """Figures of the graph that these settings give."""
        if self.measured is None:
            self._measure()
        step = Quantize(
            self.recipe,
            settings,
            calibration=self.static.calibration,
            kernels=self.static.kernels,
            measured=self.measured,
        )
        return self.judge.graph(Pipeline("trial", (step,)).run(self.graph)[0])

    def _measure(self) -> None:
        assert self.static.calibration is not None
        graph = self.graph.clone()
        pools_of_means(graph)
        names = {layer.name for layer in self.layers if _static(layer, self.recipe)}
        layers = [layer for layer in find_layers(graph) if layer.name in names]
        kernels = self.static.kernels
        self.measured = measure(graph, layers, self.static.calibration, kernels, self.say)


def _static(layer: Layer, recipe: Recipe) -> bool:
    asked = recipe.setting(layer.kind)
    setting = None if asked is None else suited(layer, asked)[0]
    return setting is not None and setting.format.static


def _float_bytes(layer: Layer) -> int:
    assert layer.weight.dtype is not None
    return int(layer.weight.dtype.itemsize)


def _fitting(layer: Layer, recipe: Recipe, form: Format) -> Setting:
    """The format as this kind of layer can have it, found with data-free means."""
    own = recipe.setting(layer.kind) or recipe.linear
    method = own.method if own is not None and own.method in DATA_FREE else "rtn"
    if layer.kind == "experts":
        group = 0 if form.bits == 8 else form.group
        form = dataclasses.replace(form, symmetric=True, activations=16, group=group)
    setting, _ = suited(layer, Setting(form, method))
    assert setting is not None
    return setting


def _without_data(setting: Setting) -> Setting:
    """The setting with a method that needs none."""
    return setting if setting.method in DATA_FREE else dataclasses.replace(setting, method="rtn")


def _damage(figures: Mapping[str, float]) -> float:
    return figures["kl"] if "kl" in figures else 1 - figures["cosine"]


@dataclasses.dataclass
class _Trial:
    """Chooses, and checks choices on the real model."""

    graph: Graph
    judge: Judge
    recipe: Recipe
    layers: list[Layer]
    options: Mapping[str, list[Choice]]
    fixed: int
    rounding: _Rounding
    held: frozenset[str]
    checks: int = 0

    def least(self, bounds: Sequence[Bound], say: Say) -> Found:
        """The fewest bytes within the bounds: bisection on the predicted damage."""
        top = sum(found[0].damage for found in self.options.values())
        best: Found | None = None
        nearest: Found | None = None
        low, high = 0.0, max(top, 1e-12) * 1.001
        guess = high
        for _ in range(_CHECKS):
            found = self._checked(self._choose(damage=guess), say)
            met = all(bound.met(found.figures) for bound in bounds)
            if met:
                best = found if best is None or found.bytes < best.bytes else best
                low = guess
            else:
                nearest = found
                high = guess
            if low >= high / 1.05 or (met and guess > top):
                break
            guess = (low * high) ** 0.5 if low > 0 else high / 8
        if best is not None:
            return best
        assert nearest is not None
        raise self._missed(bounds, nearest)

    def within(self, size: int, bounds: Sequence[Bound], say: Say) -> Found:
        """The least damage in so many bytes."""
        picked = self._choose(size=size)
        found = self._checked(picked, say)
        if found.bytes > size:
            raise CheckFailed(
                f"the weights take {found.bytes:,} bytes at the least, {size:,} are allowed;"
                f" the largest layers are {self._largest(picked)}",
                "allow more, or a lower format",
            )
        if not all(bound.met(found.figures) for bound in bounds):
            raise self._missed(bounds, found, f" within {size:,} bytes")
        return found

    def _largest(self, picked: Mapping[str, int]) -> str:
        size = {name: self.options[name][i].bytes for name, i in picked.items()}
        return ", ".join(sorted(size, key=lambda name: -size[name])[:3])

    def _choose(self, damage: float | None = None, size: int | None = None) -> dict[str, int]:
        """An option for each layer: start lowest, then buy what saves most damage for its bytes."""
        picked = dict.fromkeys(self.options, 0)
        total = sum(found[0].damage for found in self.options.values())
        used = self.fixed + sum(found[0].bytes for found in self.options.values())
        heap: list[tuple[float, str, int]] = []
        for name in self.options:
            self._offer(heap, name, 0)
        while heap and (damage is None or total > damage):
            _, name, step = heapq.heappop(heap)
            now, then = self.options[name][picked[name]], self.options[name][step]
            if size is not None and used + then.bytes - now.bytes > size:
                continue
            total += then.damage - now.damage
            used += then.bytes - now.bytes
            picked[name] = step
            self._offer(heap, name, step)
        return picked

    def _offer(self, heap: list[tuple[float, str, int]], name: str, at: int) -> None:
        """Put the best next step of a layer on the heap."""
        options, now = self.options[name], self.options[name][at]
        steps = [
            ((now.damage - options[i].damage) / max(options[i].bytes - now.bytes, 1), i)
            for i in range(at + 1, len(options))
        ]
        if steps:
            gain, step = max(steps)
            heapq.heappush(heap, (-gain, name, step))

    def _checked(self, picked: Mapping[str, int], say: Say) -> Found:
        self.checks += 1
        chosen = {name: self.options[name][i] for name, i in picked.items()}
        used = self.fixed + sum(choice.bytes for choice in chosen.values())
        say(f"checking a plan of {used:,} bytes")
        figures = self._figures(chosen)
        settings = {
            name: choice.setting if name in self.held else self._real(choice.setting)
            for name, choice in chosen.items()
        }
        notes = {
            name: f"damage {self.options[name][0].damage:.2g} at the lowest"
            for name, i in picked.items()
            if i > 0
        }
        plan = Plan(self.recipe, settings)
        return Found(plan, figures, used, notes, self.checks, self.rounding.measured)

    def _figures(self, chosen: Mapping[str, Choice]) -> dict[str, float]:
        if any(c.setting is not None and c.setting.format.static for c in chosen.values()):
            return self.rounding.figures({name: c.setting for name, c in chosen.items()})
        changed = {}
        for layer in self.layers:
            setting = chosen[layer.name].setting
            if setting is not None:
                rounded = quantize_matrix(matrix(layer), _without_data(setting)).dequantized()
                changed[layer.weight.name or ""] = layer.stored(rounded)
        return self.judge.weights(changed)

    def _real(self, setting: Setting | None) -> Setting | None:
        """The setting with the recipe's own method, for formats that it can be asked for."""
        linear = self.recipe.linear
        if setting is None or linear is None or setting.format.bits >= 8:
            return setting
        return dataclasses.replace(setting, method=linear.method)

    def _missed(self, bounds: Sequence[Bound], found: Found, within: str = "") -> CheckFailed:
        worst = sorted(self.options, key=lambda n: self.options[n][0].damage, reverse=True)[:3]
        figures = ", ".join(f"{name} {value:.5g}" for name, value in found.figures.items())
        return CheckFailed(
            f"the budget {', '.join(map(str, bounds))} is not met{within}: the best found has"
            f" {figures} at {found.bytes:,} bytes; the worst layers are {', '.join(worst)}",
            "allow more, add higher formats, or calibrate on more data",
        )
