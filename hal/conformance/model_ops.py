"""The ops of one model as cases: each with the attributes, dtypes and shapes that it has there.

The model runs once through the reference evaluator, and a case gets the inputs that its op saw: so
indices are within range and masks are masks. Weights are constants of the case where they are
constants of the model. What quantization puts around an op (``DequantizeLinear`` before it,
``QuantizeLinear`` behind it) is part of its case, because that is what kernels are written for.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

import hal
from hal import frontends
from hal.conformance.models import ModelCase
from hal.errors import InputError, did_you_mean
from hal.ir import Graph, dtype_name, used_values, verify
from hal.ir.evaluate import Evaluator
from hal.passes import default_pipeline
from hal.passes.fix_dims import fix_dims
from hal.runtime.samples import DEFAULT_EXTENTS, OTHER_EXTENT, sample_inputs
from hal.runtime.state import empty_state
from hal.runtime.verification import RANDOM_OPS
from hal.targets import resolve

_SEED = 0
_LIST_LENGTH = 8
"""An integer constant up to this length (axes, a shape) counts as an attribute."""
_IN_FILE = 1 << 20
"""Weights of a case beyond this many bytes lie in a file of their own."""

Values = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class BoundDim:
    """A dynamic dim, its extent in the cases, and who chose it: ``given``, ``stored``, ``default``.

    ``stored`` is what the inputs have that a bundle keeps from its compilation.
    """

    name: str
    extent: int
    origin: str


@dataclasses.dataclass(frozen=True)
class ModelOps:
    """The cases of a model, what its dims were bound to, and the ops that have no case, and why."""

    cases: tuple[ModelCase, ...]
    dims: tuple[BoundDim, ...]
    left_out: Mapping[str, str]


def model_ops(
    source: str | Path, target: str = "host", dims: Mapping[str, int] | None = None
) -> ModelOps:
    """The ops of a bundle, or of anything :func:`hal.compile` takes as a path, as cases.

    There is one case for each distinct op, attributes, and dtypes and shapes of inputs and outputs.
    A model with carried state gives those of a prompt and those of the token after it; its state is
    passed by value, as in the neutral graph. ``dims`` binds dynamic dims; ``target`` prices what a
    language model that is no bundle yet would carry.

    Raises:
        InputError: ``dims`` names no dim of the inputs.
        HalError: the model cannot be read, or the reference cannot run it.
    """
    given = dict(dims or {})
    path = Path(source)
    is_bundle = path.suffix == ".hal" or (path / "manifest.json").is_file()
    if is_bundle:
        bundle = hal.load(path)
        graph, stored = bundle.graph(), bundle.samples()
    else:
        graph, stored = frontends.load(str(source)).graph, []
    bound = _bind(graph, given, [] if given else stored)
    if not graph.state:
        graph = fix_dims(graph, {d.name: d.extent for d in bound})
    if not is_bundle:
        verify(graph)
        graph, _ = default_pipeline(resolve(target).descriptor).run(graph)
    steps = _steps(graph, bound) if given or not stored else stored
    cases, left_out = _cases(graph, steps[:2])
    return ModelOps(cases, bound, left_out)


# -- inputs -----------------------------------------------------------------------------------


def _bind(graph: Graph, given: Mapping[str, int], stored: Sequence[Values]) -> tuple[BoundDim, ...]:
    """An extent for each named dim of the inputs; dims of carried state follow from them."""
    found: dict[str, BoundDim] = {}
    for spec in graph.signature().inputs:
        for axis, dim in enumerate(spec.dims or ()):
            if isinstance(dim, int) or not dim.isidentifier() or dim in found:
                continue
            if dim in given:
                found[dim] = BoundDim(dim, given[dim], "given")
            elif stored and spec.name in stored[0]:
                found[dim] = BoundDim(dim, int(stored[0][spec.name].shape[axis]), "stored")
            else:
                extent = DEFAULT_EXTENTS.get(dim, OTHER_EXTENT)
                found[dim] = BoundDim(dim, extent, "default")
    for name in given:
        if name not in found:
            raise InputError(
                f"the model has no dynamic dim {name!r}",
                did_you_mean(name, found) if found else "its shapes are static already",
            )
    return tuple(found.values())


def _steps(graph: Graph, bound: Iterable[BoundDim]) -> list[Values]:
    """Random inputs of one call, and of the next one with one token if the model carries state."""
    extents = {d.name: d.extent for d in bound}
    specs = graph.signature().inputs
    steps = [sample_inputs(specs, seed=_SEED, extents=extents, metadata=graph.metadata)]
    if graph.state:
        extents["sequence"] = 1
        steps.append(sample_inputs(specs, seed=_SEED + 1, extents=extents, metadata=graph.metadata))
    return steps


# -- cases ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Unit:
    """A node with the quantization around it.

    ``nodes`` are in order. ``inputs`` come from outside and differ from call to call, ``constants``
    do not; ``outputs`` are what others read.
    """

    core: ir.Node
    nodes: tuple[ir.Node, ...]
    inputs: tuple[ir.Value, ...]
    constants: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]


def _cases(graph: Graph, steps: Sequence[Values]) -> tuple[tuple[ModelCase, ...], dict[str, str]]:
    left_out: dict[str, str] = {}
    units = list(_units(graph, left_out))
    wanted = dict.fromkeys(
        v.name or ""
        for unit in units
        for v in (*unit.inputs, *unit.constants, *unit.outputs)
        if v.producer() is not None
    )
    found: dict[str, tuple[_Unit, Values]] = {}
    places: dict[str, list[str]] = collections.defaultdict(list)
    for values in _evaluated(graph, steps, list(wanted)):
        for unit in units:
            key = _key(unit, values)
            if key not in found:
                names = (v.name or "" for v in (*unit.inputs, *unit.constants, *unit.outputs))
                found[key] = (unit, {name: values[name] for name in names if name in values})
            place = unit.core.name or unit.core.outputs[0].name or ""
            if place not in places[key]:
                places[key].append(place)
    taken: collections.Counter[str] = collections.Counter()
    cases = []
    for key, (unit, values) in found.items():
        name = _name(unit, values)
        taken[name] += 1
        number = f"-{taken[name]}" if taken[name] > 1 else ""
        cases.append(_case(graph, unit, values, name + number, places[key]))
    return tuple(cases), left_out


def _evaluated(graph: Graph, steps: Sequence[Values], wanted: list[str]) -> Iterator[Values]:
    """Inputs and the wanted values of each call, the state carried between them."""
    carried_out = [s.output for s in graph.state]
    evaluator = Evaluator(graph, list(dict.fromkeys([*wanted, *carried_out])))
    specs = graph.input_specs()
    first = graph.signature().inputs[0].name if graph.state else ""
    carried = {s.input: empty_state(s, specs[s.input], len(steps[0][first])) for s in graph.state}
    for step in steps:
        feeds = {**step, **carried}
        values = evaluator(feeds)
        carried = {s.input: values[s.output] for s in graph.state}
        yield {**feeds, **values}


def _units(graph: Graph, left_out: dict[str, str]) -> Iterator[_Unit]:
    """Each node that is no constant, with the quantization around it."""
    fixed = _constants(graph)
    order = {node: index for index, node in enumerate(graph.graph)}
    for node in graph.graph:
        if _is_part_of_another(node) or all(v in fixed for v in node.outputs):
            continue
        if node.op_type in RANDOM_OPS:
            left_out[op_name(node)] = "its results are random by definition"
            continue
        nodes, output = {node}, node.outputs[0]
        for value in used_values(node):
            if value in fixed:
                nodes |= _quantized_constant(value)
            elif (maker := value.producer()) is not None and maker.op_type == "DequantizeLinear":
                nodes.add(maker)
        outputs = [v for v in node.outputs if v.name and (v.uses() or v.is_graph_output())]
        if (reader := _only_quantizer(output)) is not None:
            nodes.add(reader)
            outputs = [reader.outputs[0] if v is output else v for v in outputs]
        ordered = tuple(sorted(nodes, key=order.__getitem__))
        made = {v for n in ordered for v in n.outputs}
        outside = [v for n in ordered for v in used_values(n) if v not in made]
        inputs = tuple(dict.fromkeys(v for v in outside if v not in fixed))
        constants = tuple(dict.fromkeys(v for v in outside if v in fixed))
        if not all(isinstance(v.type, ir.TensorType) for v in (*inputs, *constants, *outputs)):
            left_out[op_name(node)] = "it works on something other than tensors"
        elif inputs and outputs:
            yield _Unit(node, ordered, inputs, constants, tuple(outputs))


def _constants(graph: Graph) -> set[ir.Value]:
    """Values that are the same in each call with inputs of the same shapes."""
    fixed = set(graph.graph.initializers.values()) - set(graph.graph.inputs)
    for node in graph.graph:
        # With all dims bound, what is computed from shapes alone is as constant as a weight.
        shape_only = node.op_type in ("Shape", "Size") and not node.domain
        if node.op_type not in RANDOM_OPS and (
            shape_only or all(v in fixed for v in used_values(node))
        ):
            fixed.update(node.outputs)
    return fixed


def _quantized_constant(value: ir.Value) -> set[ir.Node]:
    """The nodes that make a constant, if they unpack codes; otherwise it is taken as it comes out.

    Kernels read codes, so the codes have to be there.
    """
    nodes: set[ir.Node] = set()
    todo = [value.producer()]
    while todo:
        node = todo.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            todo += [v.producer() for v in used_values(node)]
    return nodes if any(n.op_type == "DequantizeLinear" for n in nodes) else set()


def _only_quantizer(value: ir.Value) -> ir.Node | None:
    """The ``QuantizeLinear`` that is the only reader of a value, or None."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    reader, index = uses[0]
    return reader if reader.op_type == "QuantizeLinear" and index == 0 else None


def _is_part_of_another(node: ir.Node) -> bool:
    """Whether a node belongs to the cases of what it stands next to."""
    value = node.outputs[0]
    if node.op_type == "DequantizeLinear":
        return bool(value.uses()) and not value.is_graph_output()
    if node.op_type != "QuantizeLinear" or node.inputs[0] is None:
        return False
    maker = node.inputs[0].producer()
    return (
        maker is not None
        and maker.outputs[0] is node.inputs[0]
        and maker.op_type not in RANDOM_OPS
        and _only_quantizer(maker.outputs[0]) is node
        and not _is_part_of_another(maker)
    )


def op_name(node: ir.Node) -> str:
    """The op as reports name it, with its domain if that is not ONNX's."""
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


# -- what makes a case ------------------------------------------------------------------------


def _key(unit: _Unit, values: Values) -> str:
    """Digest of ops, attributes, dtypes and shapes: equal for nodes that one case stands for."""
    digest = hashlib.sha256()
    numbers: dict[ir.Value | None, int] = {None: -1}
    for value in (*unit.inputs, *unit.constants):
        numbers[value] = len(numbers)
        fixed = value in unit.constants
        digest.update(f"{numbers[value]} {fixed} {_spec(value, values)}".encode())
        tensor = _tensor(value, values) if fixed else None
        is_list = tensor is not None and len(tensor.shape) == 1 and tensor.dtype.is_integer()
        if tensor is not None and is_list and tensor.size <= _LIST_LENGTH:
            digest.update(tensor.numpy().tobytes())
    for node in unit.nodes:
        for value in node.outputs:
            numbers[value] = len(numbers)
        ends = [numbers.get(value, -2) for value in (*node.inputs, *node.outputs)]
        digest.update(f"{op_name(node)} {ends}".encode())
        for name in sorted(node.attributes):
            attribute = ir.to_proto(node.attributes[name])
            digest.update(attribute.SerializeToString(deterministic=True))
    for value in unit.outputs:
        digest.update(_spec(value, values).encode())
    return digest.hexdigest()


def _spec(value: ir.Value, values: Values) -> str:
    """``float32_1x8x64``."""
    if value.name in values:
        array = np.asarray(values[value.name])
        name = "string" if array.dtype.kind in "OU" else array.dtype.name
    else:
        assert value.const_value is not None
        name = dtype_name(value.const_value.dtype)
    return f"{name}_{'x'.join(map(str, _shape(value, values))) or 'scalar'}"


def _shape(value: ir.Value, values: Values) -> tuple[int, ...]:
    if value.name in values:
        return tuple(np.shape(values[value.name]))
    assert value.const_value is not None
    return tuple(value.const_value.shape.numpy())


def _tensor(value: ir.Value, values: Values) -> ir.TensorProtocol:
    """What a constant holds."""
    if value.const_value is not None:
        return value.const_value
    array = values[value.name or ""]
    return ir.tensor(np.ascontiguousarray(array).reshape(np.shape(array)), name=value.name)


def _name(unit: _Unit, values: Values) -> str:
    # Scales and zero points are told by what they scale.
    scaled = [n for n in unit.nodes if n.op_type in ("DequantizeLinear", "QuantizeLinear")]
    beside = {v for n in scaled if n is not unit.core for v in n.inputs[1:]}
    parts = [_spec(v, values) for v in unit.inputs]
    parts += [f"const_{_spec(v, values)}" for v in unit.constants if v not in beside]
    return "-".join([op_name(unit.core).replace("::", "."), *parts])


def _case(graph: Graph, unit: _Unit, values: Values, name: str, places: Sequence[str]) -> ModelCase:
    proto = onnx.GraphProto(name=name)
    proto.node.extend(ir.serde.serialize_node(node) for node in unit.nodes)
    proto.input.extend(_info(v, values) for v in (*unit.inputs, *unit.constants))
    proto.output.extend(_info(v, values) for v in unit.outputs)
    functions = [ir.serde.serialize_function(f) for f in _functions(graph.model, unit.nodes)]
    model = onnx.ModelProto(
        ir_version=graph.model.ir_version,
        graph=proto,
        functions=functions,
        opset_import=[
            onnx.helper.make_opsetid(domain, version)
            for domain, version in graph.model.opset_imports.items()
        ],
    )
    constants = {v.name or "": _tensor(v, values) for v in unit.constants}
    inputs = {v.name or "": values[v.name or ""] for v in unit.inputs}
    return ModelCase(
        name,
        functools.partial(_write, model, constants),
        {"inputs": inputs},
        op_name(unit.core),
        _about(unit.core, places),
    )


def _info(value: ir.Value, values: Values) -> onnx.ValueInfoProto:
    assert value.dtype is not None
    return onnx.helper.make_tensor_value_info(
        value.name or "", int(value.dtype), _shape(value, values)
    )


def _functions(model: ir.Model, nodes: Iterable[ir.Node]) -> Iterator[ir.Function]:
    """Bodies that these nodes need, and those that the bodies need."""
    seen: set[Any] = set()
    todo = list(nodes)
    while todo:
        identifier = todo.pop().op_identifier()
        function = model.functions.get(identifier)
        if function is not None and identifier not in seen:
            seen.add(identifier)
            todo += list(function.all_nodes())
            yield function


def _write(
    proto: onnx.ModelProto, constants: Mapping[str, ir.TensorProtocol], folder: Path
) -> Path:
    """Write the case as an ONNX file. Constants come as inputs, and get their values here."""
    model = ir.from_proto(proto)
    large = sum(tensor.nbytes for tensor in constants.values()) > _IN_FILE
    for value in [v for v in model.graph.inputs if v.name in constants]:
        model.graph.inputs.remove(value)
        tensor = constants[value.name or ""]
        if isinstance(tensor, ir.ExternalTensor) and not large:
            tensor = ir.Tensor(tensor.numpy(), tensor.dtype, name=value.name)
        value.const_value = tensor
        model.graph.register_initializer(value)
    path = folder / "case.onnx"
    ir.save(model, path, external_data="case.weights" if large else None)
    return path


def _about(node: ir.Node, places: Sequence[str]) -> str:
    """``axis=-1; 12 nodes, first 'layers.0.norm'``."""
    shown = [
        f"{name}={attribute.value}"
        for name, attribute in node.attributes.items()
        if attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        and len(str(attribute.value)) <= 40
    ]
    count = f"{len(places)} nodes, first {places[0]!r}" if len(places) > 1 else repr(places[0])
    return "; ".join([*([", ".join(shown)] if shown else []), count])
