"""Static 8-bit activations: one scale and zero point for each tensor, found on samples.

The graph that results is standard ONNX: ``QuantizeLinear`` and ``DequantizeLinear`` around every
convolution and product, so that any runtime's integer kernels can take the place of
``DequantizeLinear → Conv → QuantizeLinear``. Weights have a scale for each output channel; biases
of convolutions are int32 with the scale of their products.

In three looks at the samples :func:`measure` finds the limits of every tensor, then how its numbers
are spread, then, for each way to choose a range, what the rounding of weights and operands does to
the results of the layers that read it: the error, and by how much it moves each output channel on
average. The range with the least error is taken. The mean shift goes into the bias (bias
correction; Nagel et al., arXiv 1906.04721).
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from hal.ir import Graph
from hal.ir.evaluate import Evaluator
from hal.passes._edit import Editor, attribute, ints, is_op, rank
from hal.passes.quantize.calibration import Calibration, Sample
from hal.passes.quantize.chains import Chains, find_chains, heavy_nodes, operands
from hal.passes.quantize.codes import Codes
from hal.passes.quantize.convolutions import by_channel, decoded
from hal.passes.quantize.formats import Format
from hal.passes.quantize.layers import Layer
from hal.passes.quantize.ranges import RULES, Coding, Histogram
from hal.passes.quantize.rewrite import put

STATIC = Format(8, 0, activations=8, static=True)
"""The format of a layer with static activations."""

_LARGEST_BIAS = 2**30
"""Codes of biases stay below, so that sums with them fit into 32 bits."""

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Kernels:
    """What integer kernels of a target read.

    Attributes:
        activations: ``uint8`` or ``int8``.
        highest: the largest code of a weight: 63 where sums of two products saturate.
    """

    activations: str = "uint8"
    highest: int = 127


@dataclasses.dataclass(frozen=True)
class Shift:
    """What rounding does to the result of one node, by rule (see :data:`RULES`).

    Attributes:
        error: squared error over squared size of the result.
        mean: float32 ``[N]``, by how much output channels are moved.
    """

    error: tuple[float, ...]
    mean: tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class Measured:
    """What samples say about the tensors (by name) and the nodes (by their result's name)."""

    histograms: Mapping[str, Histogram]
    shifts: Mapping[str, Shift]

    def covers(self, graph: Graph, layers: Sequence[Layer]) -> bool:
        """Whether it says all that :func:`apply` needs for ``layers``."""
        chains = find_chains(graph, layers)
        nodes = {node.outputs[0].name for node in chains.heavy}
        return (
            nodes <= self.shifts.keys()
            and {value.name for value in chains.coded} <= self.histograms.keys()
        )


@dataclasses.dataclass(frozen=True)
class Applied:
    """What :func:`apply` did.

    Attributes:
        codes: by layer.
        facts: JSON-ready: dtype and number of coded tensors, ranges by rule, ops between layers.
    """

    codes: Mapping[str, Codes]
    facts: Mapping[str, Any]


def measure(
    graph: Graph,
    layers: Sequence[Layer],
    calibration: Calibration,
    kernels: Kernels,
    say: Say = lambda _: None,
) -> Measured:
    """Look at ``calibration`` three times; ``graph`` stays as it is."""
    chains = find_chains(graph, layers)
    names = [value.name or "" for value in chains.coded]
    say(f"ranges of {len(names)} tensors")
    histograms = _histograms(graph, names, calibration.samples)
    say("errors of the layers")
    shifts = _shifts(graph, layers, histograms, calibration.samples, kernels)
    return Measured(histograms, shifts)


def apply(graph: Graph, layers: Sequence[Layer], measured: Measured, kernels: Kernels) -> Applied:
    """Compute ``layers`` in integers: codes for weights, biases and all tensors between."""
    chains = find_chains(graph, layers)
    choice = _choose(chains, measured, kernels)
    codes = {}
    for layer in layers:
        places = [_Place(node, choice, measured) for node in heavy_nodes(layer)]
        codes[layer.name] = found = _codes(layer, places, kernels)
        if layer.kind == "conv":
            _put_convolution(graph, layer, found, places)
        else:
            put(graph, layer, found)
            for place in places:
                _shift_product(graph, place)
    for value, (_, coding) in choice.items():
        _code(graph, value, coding, None if value in chains.whole else chains.readers)
    return Applied(codes, _facts(chains, choice, kernels))


def pools_of_means(graph: Graph) -> int:
    """Means over all axes but the first two become global pools, which have integer kernels."""
    count = 0
    for node in list(graph.graph):
        if not is_op(node, "ReduceMean") or node.inputs[0] is None or len(node.inputs) < 2:
            continue
        axes, size = ints(node.inputs[1]), rank(node.inputs[0])
        keeps = attribute(node, "keepdims", 1)
        if not axes or size is None or size < 3 or not keeps:
            continue
        if sorted(axis % size for axis in axes) != list(range(2, size)):
            continue
        edit = Editor(graph)
        edit.at(node)
        old = node.outputs[0]
        pool = edit.op("GlobalAveragePool", node.inputs[:1], like=old)
        if old.is_graph_output():
            edit.replace(old, pool)
        else:
            name = old.name
            old.replace_all_uses_with(pool)
        graph.graph.remove(node, safe=True)
        if not pool.is_graph_output():
            pool.name = name
        count += 1
    return count


# -- looking at samples -----------------------------------------------------------------------


def _histograms(
    graph: Graph, names: Sequence[str], samples: Sequence[Sample]
) -> dict[str, Histogram]:
    run = Evaluator(graph, list(names))
    limits = {name: [0.0, 0.0] for name in names}
    for sample in samples:
        for name, array in run(sample).items():
            low, high = limits[name]
            limits[name] = [min(low, float(array.min())), max(high, float(array.max()))]
    found = {name: Histogram(*limits[name]) for name in names}
    for sample in samples:
        for name, array in run(sample).items():
            found[name].add(array)
    return found


def _shifts(
    graph: Graph,
    layers: Sequence[Layer],
    histograms: Mapping[str, Histogram],
    samples: Sequence[Sample],
    kernels: Kernels,
) -> dict[str, Shift]:
    """What rounding does to each layer by itself, its input being the float graph's."""
    clone = graph.clone()
    made = {node.outputs[0].name: node for node in clone.graph}
    source = find_chains(graph, layers).coded
    edit, outputs = Editor(clone), dict[str, list[str]]()
    for layer in layers:
        weight = layer.stored(
            by_channel(_matrix(layer), STATIC, highest=kernels.highest).dequantized()
        )
        rounded = edit.tensor(ir.tensor(weight), f"{layer.weight.name}.rounded")
        for node in heavy_nodes(layer):
            x = node.inputs[0]
            assert x is not None
            ranges = histograms[source[x].name or ""].candidates()
            codings = [Coding.covering(*ranges[rule], kernels.activations) for rule in RULES]
            name = node.outputs[0].name or ""
            outputs[name] = _branches(edit, made[name], rounded, codings, layer)
    run = Evaluator(clone, [name for names in outputs.values() for name in names])
    totals: dict[str, Any] = {}
    for sample in samples:
        for name, value in run(sample).items():
            totals[name] = totals.get(name, 0) + np.asarray(value, np.float64)
    return {name: _shift(totals, names) for name, names in outputs.items()}


def _branches(
    edit: Editor, node: ir.Node, rounded: ir.Value, codings: Sequence[Coding], layer: Layer
) -> list[str]:
    """Nodes that compare ``node`` with what it gives in integers; names of the figures.

    They are the squared size of the result and its number of elements, then for each coding the
    squared error and the sum of the differences of each channel.
    """
    right, x = node.outputs[0], node.inputs[0]
    graph = node.graph
    assert graph is not None
    edit.at(node)
    last = ir.node("Identity", [right])  # branches come after the node
    last.outputs[0].name = edit.fresh("branch")
    graph.insert_after(node, last)
    edit.at(last)
    dims = rank(right) or 0
    channel = 1 if layer.kind == "conv" else dims - 1
    axes = edit.constant([axis for axis in range(dims) if axis != channel], "axes", np.int64)
    figures = [
        edit.op("ReduceSumSquare", [right], {"keepdims": 0}),
        edit.op("Cast", [edit.op("Size", [right])], {"to": ir.DataType.FLOAT.value}),
    ]
    across = layer.kind == "conv" or layer.across
    weight = rounded if across else edit.op("Transpose", [rounded], {"perm": [1, 0]})
    for coding in codings:
        parameters = _parameters(edit, coding)
        codes = edit.op("QuantizeLinear", [x, *parameters])
        inputs = [edit.op("DequantizeLinear", [codes, *parameters]), weight, *node.inputs[2:]]
        attributes = {name: a.value for name, a in node.attributes.items()}
        wrong = edit.op("Sub", [edit.op(node.op_type, inputs, attributes), right])
        figures.append(edit.op("ReduceSumSquare", [wrong], {"keepdims": 0}))
        figures.append(edit.op("ReduceSum", [wrong, axes], {"keepdims": 0}))
    for figure in figures:
        figure.type = ir.TensorType(ir.DataType.FLOAT)
    return [figure.name or "" for figure in figures]


def _shift(totals: Mapping[str, Any], names: Sequence[str]) -> Shift:
    size, count, *rest = (totals[name] for name in names)
    errors = tuple(float(error / max(float(size), 1e-30)) for error in rest[::2])
    means = tuple((moved * (len(moved) / count)).astype(np.float32) for moved in rest[1::2])
    return Shift(errors, means)


# -- choosing ---------------------------------------------------------------------------------

_Choice = Mapping[ir.Value, tuple[int, Coding]]
"""For each tensor the number of the rule and the codes."""


def _choose(chains: Chains, measured: Measured, kernels: Kernels) -> _Choice:
    """The range that hurts the layers that read a tensor least, or the tensor if there are none."""
    errors: dict[ir.Value, np.ndarray] = {}
    for node in chains.heavy:
        source = chains.coded[operands(node)[0]]
        found = np.asarray(measured.shifts[node.outputs[0].name or ""].error)
        errors[source] = errors.get(source, 0) + found
    choice: dict[ir.Value, tuple[int, Coding]] = {}
    for value, source in chains.coded.items():
        if source in choice:
            choice[value] = choice[source]
            continue
        histogram = measured.histograms[source.name or ""]
        ranges = histogram.candidates()
        codings = [Coding.covering(*ranges[rule], kernels.activations) for rule in RULES]
        if source in errors:
            rule = int(np.argmin(errors[source]))
        else:
            rule = int(np.argmin([histogram.error(coding) for coding in codings]))
        choice[value] = rule, codings[rule]
    return choice


class _Place:
    """One node of a layer: the codes of its operand, and what to take from its result."""

    def __init__(self, node: ir.Node, choice: _Choice, measured: Measured) -> None:
        self.node = node
        rule, self.coding = choice[operands(node)[0]]
        self.shift = measured.shifts[node.outputs[0].name or ""].mean[rule]

    @property
    def bias(self) -> np.ndarray | None:
        """The convolution's bias less the shift, float64 ``[N]``; None if it is no constant."""
        given = self.node.inputs[2] if len(self.node.inputs) > 2 else None
        if given is None:
            return -self.shift.astype(np.float64)
        if given.const_value is None or not given.is_initializer():
            return None
        bias: np.ndarray = given.const_value.numpy().astype(np.float64) - self.shift
        return bias


def _codes(layer: Layer, places: Sequence[_Place], kernels: Kernels) -> Codes:
    weight = _matrix(layer)
    if layer.kind != "conv":
        return by_channel(weight, STATIC, highest=kernels.highest, dtype=np.float16)
    least = np.zeros(len(weight))
    for place in places:
        bias = place.bias
        if bias is not None:
            needed = np.abs(bias) / (_LARGEST_BIAS * place.coding.scale)
            # channels of several groups of a transposed convolution share a scale
            least = np.maximum(least, needed.reshape(-1, len(weight)).max(0))
    return by_channel(weight, STATIC, least, kernels.highest)


def _matrix(layer: Layer) -> np.ndarray:
    assert layer.weight.const_value is not None
    array = np.asarray(layer.weight.const_value.numpy(), np.float32)
    return np.ascontiguousarray(layer.matrix(array))


# -- writing ----------------------------------------------------------------------------------


def _parameters(edit: Editor, coding: Coding) -> list[ir.Value]:
    return [
        edit.constant(coding.scale, "activation.scale", np.float32),
        edit.constant(coding.zero, "activation.zero", coding.dtype),
    ]


def _put_convolution(graph: Graph, layer: Layer, codes: Codes, places: Sequence[_Place]) -> None:
    edit = Editor(graph)
    edit.at(places[0].node)
    weight = decoded(edit, layer, codes)
    for place in places:
        edit.at(place.node)
        place_bias = place.bias
        place.node.replace_input_with(1, weight)
        if place_bias is None:
            continue
        scale = codes.scale.reshape(-1).astype(np.float32) * np.float32(place.coding.scale)
        scale = np.tile(scale, len(place_bias) // len(scale))
        whole = np.clip(np.rint(place_bias / scale), -(2**31), 2**31 - 1).astype(np.int32)
        base = f"{layer.weight.name}.bias"
        inputs = [edit.constant(whole, f"{base}.codes"), edit.constant(scale, f"{base}.scale")]
        bias = edit.op("DequantizeLinear", inputs, {"axis": 0})
        bias.type, bias.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([len(whole)])
        place.node.resize_inputs(3)
        place.node.replace_input_with(2, bias)


def _shift_product(graph: Graph, place: _Place) -> None:
    """Take the mean shift from a product's result: from the bias that follows, if one does."""
    result = place.node.outputs[0]
    uses = tuple(result.uses())
    adds = uses[0].node if len(uses) == 1 and is_op(uses[0].node, "Add") else None
    other = adds.inputs[1 - uses[0].idx] if adds is not None else None
    edit = Editor(graph)
    if other is None or other.const_value is None or not other.is_initializer():
        return  # a sum of its own would cost more than it gives
    bias = other.const_value.numpy().astype(np.float32)
    if bias.shape != place.shift.shape:
        return
    assert adds is not None
    constant = edit.constant(bias - place.shift, f"{other.name}.corrected")
    adds.replace_input_with(1 - uses[0].idx, constant)


def _code(
    graph: Graph, value: ir.Value, coding: Coding, readers: frozenset[ir.Node] | None
) -> None:
    """Code and decode ``value`` for ``readers``, or for all that read it and for the caller."""
    uses = [use for use in value.uses() if readers is None or use.node in readers]
    edit = Editor(graph)
    maker = value.producer()
    first = next(node for node in graph.graph if node is maker or maker is None)
    edit.at(first)
    parameters = _parameters(edit, coding)
    coder = ir.node("QuantizeLinear", [value, *parameters])
    decoder = ir.node("DequantizeLinear", [coder.outputs[0], *parameters])
    codes, result = coder.outputs[0], decoder.outputs[0]
    codes.name, result.name = edit.fresh(f"{value.name}.codes"), edit.fresh(f"{value.name}.rounded")
    codes.type, codes.shape = ir.TensorType(ir.DataType[coding.dtype.upper()]), value.shape
    result.type, result.shape = value.type, value.shape
    if maker is None:
        graph.graph.insert_before(first, [coder, decoder])
    else:
        graph.graph.insert_after(maker, [coder, decoder])
    for use in uses:
        use.node.replace_input_with(use.idx, result)
    if readers is None and value.is_graph_output():
        outputs = graph.graph.outputs
        outputs[outputs.index(value)] = result
        value.name, result.name = edit.fresh(f"{value.name}.float"), value.name


def _facts(chains: Chains, choice: _Choice, kernels: Kernels) -> dict[str, Any]:
    rules = collections.Counter(RULES[rule] for rule, _ in choice.values())
    return {
        "dtype": kernels.activations,
        "tensors": len(choice),
        "ranges": dict(rules),
        "integer_ops": dict(collections.Counter(node.op_type for node in chains.between)),
        "float_ops": dict(collections.Counter(node.op_type for node in chains.floats)),
    }


__all__ = [
    "STATIC",
    "Applied",
    "Kernels",
    "Measured",
    "Shift",
    "apply",
    "measure",
    "pools_of_means",
]
