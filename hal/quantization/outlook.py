"""Whether a target gains from a recipe, said before the long work.

Where memory is the limit, a token costs the bytes of weights that it reads. What a target's
kernels read is asked of its backend, for a small sample of each kind of layer, quantized: formats
without a kernel are widened or expanded there as they are in a build.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.parser
import onnx_ir as ir

from hal.errors import HalError
from hal.ir import Graph
from hal.ir.inline import infer_types
from hal.ir.ops import ensure_functions
from hal.passes.quantize import Quantize
from hal.passes.quantize.calibration import Calibration
from hal.passes.quantize.formats import Recipe, Setting
from hal.passes.quantize.layers import Layer, find_layers
from hal.targets import ResolvedTarget, load_backend
from hal.targets.reading import bytes_read

GAINS = 0.9
"""Weights that are read in more than this part of their float bytes gain nothing worth telling."""

_ROWS, _EXPERTS, _LENGTH = 256, 4, 8
_AS_FLOATS: tuple[float, Sequence[str]] = (1.0, ())
_UNTOLD = ("its codes become floats in the build",)
_HEAD = '<ir_version: 10, opset_import: ["": 21, "hal": 1]> sample '


@dataclasses.dataclass(frozen=True)
class Outlook:
    """What is expected of a target.

    Attributes:
        target: its name.
        unit: what reads the bytes, ``token`` or ``call``.
        bytes: of weights that are read.
        float_bytes: the same of the float model.
        bandwidth: bytes a second, where the descriptor has them.
        lacking: formats that the target has no kernel for, and what becomes of their codes.
    """

    target: str
    unit: str
    bytes: int
    float_bytes: int
    bandwidth: float | None = None
    lacking: tuple[str, ...] = ()

    def __str__(self) -> str:
        """A sentence for the user."""
        text = f"{self.target}: {reading_text(self.bytes, self.float_bytes, self.unit)}"
        if self.bandwidth:
            text += f"; {1e3 * self.bytes / self.bandwidth:.3g} ms at its memory's bandwidth"
        return "; ".join([text, *self.lacking])

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        return {**dataclasses.asdict(self), "lacking": list(self.lacking), "sentence": str(self)}


def reading_text(read: int, floats: int, unit: str) -> str:
    """``reads 0.24 GB of weights a token instead of 1.45 GB: up to 6.0 times faster …``."""
    text = f"reads {_bytes(read)} of weights a {unit} instead of {_bytes(floats)}"
    if read > floats / GAINS:
        return f"{text}: slower than floats where memory is the limit"
    if read > GAINS * floats:
        return f"{text}: no gain in speed expected"
    return f"{text}: up to {floats / max(read, 1):.1f} times faster where memory is the limit"


def outlook(graph: Graph, step: Quantize, targets: Sequence[ResolvedTarget]) -> list[Outlook]:
    """What each target whose backend can tell is expected to gain from quantizing ``graph`` so.

    Raises:
        InputError: the step does not fit the graph.
    """
    chosen = [(layer, setting) for layer, setting, _ in step.choose(find_layers(graph)) if setting]
    floats = bytes_read(graph.graph)
    unit = "token" if graph.metadata.get("task") == "causal-lm" else "call"
    found = []
    for target in targets:
        try:
            parts = _ask(chosen, target)
        except HalError:
            continue  # the build will say what is wrong with the target
        if parts is None:
            continue
        lacking: dict[tuple[str, str], dict[str, None]] = {}
        total = float(floats)
        for (layer, setting), (ratio, reasons) in zip(chosen, parts, strict=True):
            total -= _float_bytes(layer) * (1 - ratio)
            gain = ", no gain expected from it" if ratio > GAINS else ""
            for reason in reasons:
                what = f"has no kernel of its own{gain}: {reason.removeprefix('weights: ')}"
                lacking.setdefault((str(setting.format), what), {})[layer.kind] = None
        told = tuple(f"{form} ({', '.join(k)}) {what}" for (form, what), k in lacking.items())
        speed = target.descriptor.memory_bandwidth()
        found.append(Outlook(target.name, unit, round(total), floats, speed, told))
    return found


def _ask(
    chosen: Sequence[tuple[Layer, Setting]], target: ResolvedTarget
) -> list[tuple[float, Sequence[str]]] | None:
    """For each layer the part of its float bytes that is read, and what its kernels lack."""
    backend = load_backend(target.backend)
    if backend.probe().status == "absent":
        return None
    known: dict[Any, tuple[float, Sequence[str]]] = {}
    result = []
    for layer, setting in chosen:
        key = _text(layer), setting.format
        # Where channels are convolved by themselves, weights are nothing beside the maps.
        alone = layer.kind == "conv" and layer.shape[1] == 1
        if layer.kind == "embedding" or alone or not key[0]:
            result.append(_AS_FLOATS)
            continue
        if key not in known:
            sample = _sample(layer)
            before = bytes_read(sample.graph)
            plain = Setting(setting.format)
            recipe = Recipe(plain, plain, plain, plain, plain)
            Quantize(recipe, calibration=_data(sample)).run(sample)
            reads = backend.weights_read(backend.legalize(sample, target.descriptor))
            if reads is None:
                return None
            ratio = reads.bytes / before
            reasons = tuple(reads.reasons) or (_UNTOLD if ratio > GAINS else ())
            known[key] = ratio, reasons
        result.append(known[key])
    return result


def _text(layer: Layer) -> str:
    """A graph with one layer like this, fewer outputs aside; empty for kinds that have none."""
    *_, rows, width = layer.shape if layer.kind != "conv" else (1, 1)
    rows = min(rows, _ROWS) // 2 * 2
    if layer.kind == "experts":
        return (
            f"(float[n, {width}] x, float[n, {_EXPERTS}] s) => (float[n, {width}] y)"
            f" <float[{_EXPERTS}, {rows}, {width}] w, float[{_EXPERTS}, {width}, {rows // 2}] d>"
            " { p = Softmax (s) k = Constant <value_ints = [1]> () v, i = TopK (p, k)"
            ' y = hal.MixtureOfExperts <activation = "silu"> (x, i, v, w, d) }'
        )
    if layer.stacked:
        heads = layer.shape[0]
        values = f"(float[n, {heads}, 1, {width}] x) => (float[n, {heads}, 1, {rows}] y)"
        return f"{values} <float[{heads}, {width}, {rows}] w> {{ y = MatMul (x, w) }}"
    if layer.kind != "conv":
        values = f"(float[n, {width}] x) => (float[n, {rows}] y) <float[{width}, {rows}] w>"
        return f"{values} {{ y = MatMul (x, w) }}"
    if layer.across:
        return ""
    rows, width, *kernel = layer.shape
    extents = ", ".join(str(size + _LENGTH - 1) for size in kernel)
    result = ", ".join([str(_LENGTH)] * len(kernel))
    weight = ", ".join(map(str, (min(rows, _ROWS), width, *kernel)))
    return (
        f"(float[n, {width}, {extents}] x) => (float[n, {min(rows, _ROWS)}, {result}] y)"
        f" <float[{weight}] w> {{ y = Conv (x, w) }}"
    )


def _sample(layer: Layer) -> Graph:
    """The graph of :func:`_text` with weights that are all zero."""
    model = onnx.parser.parse_model(_HEAD + _text(layer))
    for info in model.graph.value_info:
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        zeros = bytes(4 * math.prod(shape))
        tensor = onnx.helper.make_tensor(info.name, onnx.TensorProto.FLOAT, shape, zeros, raw=True)
        model.graph.initializer.append(tensor)
    del model.graph.value_info[:]
    graph = Graph.from_model(ir.from_proto(model))
    ensure_functions(graph.model)
    infer_types(graph.model)
    return graph


def _data(sample: Graph) -> Calibration:
    """Numbers for formats that look at ranges."""
    rng = np.random.default_rng(0)
    shapes = {s.name: [1, *map(int, (s.dims or ())[1:])] for s in sample.signature().inputs}
    return Calibration(
        [{n: rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}]
    )


def _float_bytes(layer: Layer) -> float:
    """Bytes that a token reads of the float weight."""
    if layer.kind == "embedding":
        return 0.0
    part = 1.0
    if layer.kind == "experts":
        node = layer.uses[0]
        chosen = node.inputs[1].shape if node.inputs[1] is not None else None
        last = chosen[-1] if chosen is not None else None
        part = min(1.0, last / layer.shape[0]) if isinstance(last, int) else 1.0
    size = 4.0 if layer.weight.dtype is None else layer.weight.dtype.itemsize
    return part * layer.size * size


def _bytes(count: int) -> str:
    """Decimal, as bandwidths are told: ``0.24 GB``."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= 0.1 * size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


__all__ = ["GAINS", "Outlook", "outlook", "reading_text"]
