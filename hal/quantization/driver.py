"""From the words of a user to a quantized graph."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hal.descriptor import Descriptor
from hal.errors import CheckFailed, InputError
from hal.ir import Graph
from hal.passes.base import PassReport, Pipeline
from hal.passes.quantize import METADATA_KEY, Quantize, find_layers
from hal.passes.quantize.formats import DATA_FREE, KINDS, Format, Recipe, Setting
from hal.passes.quantize.layers import Layer
from hal.passes.quantize.quantize import shared
from hal.passes.quantize.static import Kernels
from hal.quantization.budget import Bound, parse_budget, parse_size
from hal.quantization.data import check_readable, load_calibration, unvarying
from hal.quantization.judge import Judge
from hal.quantization.outlook import outlook
from hal.quantization.plan import Plan, plan_of
from hal.quantization.search import Found, Static, search
from hal.runtime.memory import give_back
from hal.targets import ResolvedTarget
from hal.targets.reading import bytes_read

AUTO = "auto"
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Request:
    """What was asked for, parsed.

    Attributes:
        plan: formats and methods; None for ``auto``.
        bounds: on accuracy.
        size: bytes that all weights may take.
        calibration: data as it was given.
        implied: the bounds are those that ``auto`` has if none are given.
    """

    plan: Plan | None
    bounds: tuple[Bound, ...] = ()
    size: int | None = None
    calibration: Any = None
    implied: bool = False


def parse_request(
    quantize: str | Path | Plan | None,
    accuracy_budget: str | None = None,
    size_budget: str | int | None = None,
    calibration: Any = None,
) -> Request | None:
    """Check the options before the long work; None if nothing is to be quantized.

    Raises:
        InputError: one does not parse, or they do not go together.
    """
    bounds = parse_budget(accuracy_budget) if accuracy_budget is not None else ()
    size = parse_size(str(size_budget)) if size_budget is not None else None
    budget = bool(bounds) or size is not None
    if quantize is None:
        if budget or calibration is not None:
            raise InputError(
                "a budget or calibration data is given, but nothing is to be quantized",
                "add quantize='auto' (--quantize auto) or a format such as w4a16",
            )
        return None
    if budget and calibration is None:
        raise InputError(
            "a budget is measured on data, and none is given",
            "add calibration (--calibration): a text file, a .npy of token ids, an .npz or a"
            " folder of images",
        )
    if isinstance(calibration, str | Path):
        check_readable(Path(calibration))
    auto = quantize == AUTO
    implied = auto and not budget and calibration is not None
    if implied:
        bounds = parse_budget("kl<=0.02")
    plan = None if auto else plan_of(quantize)
    if budget and plan is not None and plan.recipe.linear is None:
        raise InputError("a budget needs a format to start from", "as in quantize='w4a16'")
    if plan is not None and calibration is None:
        _require_data_free(plan)
    return Request(plan, bounds, size, calibration, implied)


def _require_data_free(plan: Plan) -> None:
    """Refuse methods that look at data, where there is none."""
    for setting in (*(plan.recipe.setting(kind) for kind in KINDS), *plan.layers.values()):
        if setting is not None and setting.method not in DATA_FREE:
            raise InputError(
                f"method {setting.method!r} looks at data, and none is given",
                f"add calibration (--calibration), or use {' or '.join(DATA_FREE)}",
            )


def quantize_graph(
    graph: Graph,
    request: Request,
    descriptor: Descriptor,
    *,
    targets: Sequence[ResolvedTarget] = (),
    tokenizer: Path | None = None,
    folder: Path | None = None,
    say: Say = lambda _: None,
) -> tuple[Graph, list[PassReport]]:
    """Quantize a neutral graph.

    What the ``targets`` gain is said before the long work, in sentences that begin with ``note:``.
    What was found and measured goes into ``graph.metadata["quantization"]``: the recipe, each
    layer's format and error, with data ``figures`` against the float graph, and with a budget the
    ``plan`` as TOML.

    Raises:
        CheckFailed: a budget is not met.
        InputError: the data does not fit the model, or a plan names layers that do not exist.
    """
    calibration = None
    judge = None
    if request.calibration is not None:
        calibration = load_calibration(request.calibration, graph, tokenizer, folder)
    kernels = integer_kernels(descriptor)
    plan = request.plan or Plan(preferred(descriptor, calibration is not None))
    expected = outlook(
        graph, Quantize(plan.recipe, plan.layers, None, calibration, kernels), targets
    )
    for each in expected:
        say(f"note: {each}")
    for text in _unused(plan, find_layers(graph)):
        say(f"note: {text}")
    float_bytes_read = bytes_read(graph.graph)
    if calibration is not None:
        if told := unvarying(calibration, graph):
            say(f"note: {told}")
        say("computing what the float model says")
        judge = Judge(graph, calibration.samples)
        if request.implied and graph.metadata.get("task") != "causal-lm":
            request = dataclasses.replace(request, bounds=parse_budget("cosine>=0.999"))
    found: Found | None = None
    if judge is not None and (request.bounds or request.size is not None):
        ladder = _ladder(plan.recipe, request.plan is None)
        found = search(
            graph,
            judge,
            plan.recipe,
            ladder,
            held=plan.layers,
            floor=request.plan is not None,
            bounds=request.bounds,
            size=request.size,
            static=Static(calibration, kernels),
            say=say,
        )
        plan = found.plan
        if not any(plan.layers.values()):
            say(f"note: nothing is quantized: floats are what meets {_asked(request)}")
            return graph, []
    give_back()  # float sessions and their graphs
    clock = _Clock(say)
    step = Quantize(
        plan.recipe,
        plan.layers,
        clock.tell,
        calibration,
        kernels,
        None if found is None else found.measured,
    )
    result, reports = Pipeline("quantization", (step,)).run(graph)
    facts = result.metadata[METADATA_KEY]
    facts["float_bytes_read"] = float_bytes_read
    facts["outlook"] = [each.to_json() for each in expected]
    if judge is not None:
        say("measuring the quantized model")
        facts["figures"] = judge.graph(result, strict=True)
        first = graph.signature().inputs[0].name
        facts["samples"] = sum(len(sample[first]) for sample in judge.samples)
        if graph.metadata.get("task") == "causal-lm":
            facts["tokens"] = sum(sample[first].size for sample in judge.samples)
        _require(request.bounds, facts["figures"])
    if found is not None:
        facts["plan"] = plan.to_toml(found.notes)
        facts["budget"] = [str(bound) for bound in request.bounds]
    return result, reports


def _unused(plan: Plan, layers: Sequence[Layer]) -> list[str]:
    """What a recipe names and the model does not have; a plan that was saved names all kinds."""
    recipe, kinds, found = plan.recipe, {layer.kind for layer in layers}, []
    for kind in sorted(recipe.named - kinds) if not plan.layers else ():
        asked = f"{kind}={recipe.setting(kind) or 'float'}"
        if not shared(kind, layers):
            found.append(f"{asked} is not used: the model has no such layers")
        elif recipe.embedding != recipe.head:
            head = recipe.head or "float"
            found.append(f"{asked} is not used: the embedding is the head's weight, head={head}")
    return found


def _asked(request: Request) -> str:
    parts = [str(bound) for bound in request.bounds]
    return ", ".join(parts + ([f"{request.size:,} bytes"] if request.size is not None else []))


def preferred(descriptor: Descriptor, data: bool) -> Recipe:
    """What ``auto`` starts from: four bits, activations as the target's instructions like them."""
    activations = 8 if has_byte_dot(descriptor) else 16
    form = Format(4, 32, True, activations)
    eight = Setting(dataclasses.replace(form, bits=8))
    static = data and activations == 8
    return Recipe(
        Setting(form, "gptq" if data else "hqq"),
        Setting(Format(8)),
        eight,
        Setting(dataclasses.replace(form, activations=16)),
        Setting(Format(8, 0, activations=8 if static else 16, static=static)),
    )


def integer_kernels(descriptor: Descriptor) -> Kernels:
    """How static activations and the weights beside them are coded for a target.

    Products of bytes are signed or not by the operands of the widest instruction. Where there is
    only one whose sums of two products saturate, weights keep to 7 bits.
    """
    products = [item for item in descriptor.offered() if {"i8", "u8"} & set(item.types)]
    whole = [item for item in products if item.does in ("dot", "matrix") and item.k > 1]
    found = max(whole or products, key=lambda item: item.lanes * item.k, default=None)
    saturates = not whole and any(item.does == "dot_saturating" for item in products)
    signed = found is not None and found.types[0] == "i8"
    return Kernels("int8" if signed else "uint8", 63 if saturates else 127)


def has_byte_dot(descriptor: Descriptor) -> bool:
    """Whether the target multiplies bytes faster than floats, by what its descriptor says."""
    return any(
        item.does in ("dot", "matrix") and item.k > 1 and {"i8", "u8"} & set(item.types)
        for item in descriptor.offered()
    )


def _ladder(recipe: Recipe, low: bool) -> list[Format]:
    """Formats from the recipe's own up to 8 bits; with ``low`` from 2 bits."""
    assert recipe.linear is not None
    own = recipe.linear.format
    lowest = 2 if low else own.bits
    above = [
        dataclasses.replace(own, bits=bits, ternary=False)
        for bits in (2, 3, 4, 8)
        if bits > lowest or (bits == lowest and not own.ternary)
    ]
    return [own, *above] if own.ternary else above


def _require(bounds: tuple[Bound, ...], figures: Mapping[str, float]) -> None:
    """The budget once more, on the graph as it will be built."""
    for bound in bounds:
        if not bound.met(figures):
            values = ", ".join(f"{name} {value:.5g}" for name, value in figures.items())
            raise CheckFailed(
                f"the budget {bound} is not met by the quantized graph: {values}",
                "allow more, or use a method that looks at data (gptq)",
            )


class _Clock:
    """Says which layer is worked on, and how long the rest will take."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._start = time.monotonic()

    def tell(self, index: int, count: int, name: str) -> None:
        """Progress of :class:`Quantize`."""
        left = ""
        if index:
            seconds = (time.monotonic() - self._start) / index * (count - index)
            left = f", {seconds:.0f} s left"
        self._say(f"quantizing {index + 1} of {count}{left}: {name}")
