"""What a graph of the IR may contain; run after every frontend and every pass.

The rules, each a function from graph to complaints:

* values: every name is defined once, before it is used; initializers have a value;
* ops: every node is an op of the default domain at :data:`hal.ir.OPSET` with inputs and attributes
  that its schema allows (of one type where it asks for one), or an op with a function body in the
  model, or an op of a foreign domain (which only a target that claims it can run);
* state: every carried tensor names an input and an output of one dtype and rank, equal in all
  static dims but the growth axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx.defs
import onnx_ir as ir

from hal.errors import GraphError, UnsupportedError
from hal.ir.graph import OPSET, Graph
from hal.ir.view import subgraphs

Rule = Callable[[Graph], Iterator[str]]


def verify(graph: Graph) -> None:
    """Check a graph against the rules of the IR.

    Raises:
        UnsupportedError: nodes of the default domain that the operator set does not know.
        GraphError: any other rule is broken; the text holds the first complaint and their number.
    """
    imported = graph.model.opset_imports.get("", OPSET)
    if imported != OPSET:
        raise GraphError(
            f"graph {graph.name!r} uses operator set {imported}, the IR is at {OPSET}",
            "bring the model to the IR through hal.frontends",
        )
    unknown = list(unknown_ops(graph))
    if unknown:
        raise UnsupportedError(
            f"no definition for {', '.join(unknown[:5])}"
            + (f" and {len(unknown) - 5} more nodes" if len(unknown) > 5 else ""),
            f"tried: ONNX operator set {OPSET}, functions in the model; "
            "give the op a function body or put it in the domain of a target that claims it",
        )
    complaints = [text for rule in RULES for text in rule(graph)]
    if complaints:
        more = f" (and {len(complaints) - 1} more)" if len(complaints) > 1 else ""
        raise GraphError(
            f"graph {graph.name!r}: {complaints[0]}{more}", "this graph is not valid ONNX"
        )


def unknown_ops(graph: Graph) -> Iterator[str]:
    """Yield ``Op (node 'name')`` for default-domain nodes with neither schema nor function body."""
    bodies = {(f.domain, f.name) for f in graph.model.functions.values()}
    for node in graph.nodes():
        standard = node.domain in ("", "ai.onnx") and (node.domain, node.op_type) not in bodies
        if standard and not onnx.defs.has(node.op_type, OPSET, ""):
            yield f"{node.op_type} (node {node.name!r})"


def _values(graph: Graph) -> Iterator[str]:
    yield from _scope(graph.graph, defined=set(), outer=set())


def _scope(body: ir.Graph, *, defined: set[str], outer: set[str]) -> Iterator[str]:
    """Check one graph; ``defined`` grows over the whole model, ``outer`` is what it may capture."""
    local = set(outer)
    for value in [*body.inputs, *body.initializers.values()]:
        name = value.name or ""
        if not name:
            yield "an input or initializer has no name"
        elif value.is_initializer() and value.const_value is None and not value.is_graph_input():
            yield f"initializer {name!r} has no value"
        elif name in defined and not value.is_initializer():
            yield f"value {name!r} is defined twice"
        defined.add(name)
        local.add(name)
    for node in body:
        missing = [v.name for v in node.inputs if v is not None and v.name not in local]
        for lost in missing:
            where = f"node {node.name!r} ({node.op_type})"
            yield f"{where} uses {lost!r} before it is defined"
        for inner in subgraphs(node):
            yield from _scope(inner, defined=defined, outer=local)
        for made in (v.name for v in node.outputs if v.name):
            if made in defined:
                yield f"value {made!r} is defined twice"
            defined.add(made)
            local.add(made)
    for lost in (v.name for v in body.outputs if v.name not in local):
        yield f"output {lost!r} is never computed"


def _ops(graph: Graph) -> Iterator[str]:
    bodies = {(f.domain, f.name) for f in graph.model.functions.values()}
    for node in graph.nodes():
        if node.domain not in ("", "ai.onnx") or (node.domain, node.op_type) in bodies:
            continue
        schema = onnx.defs.get_schema(node.op_type, OPSET, "")
        where = f"node {node.name!r} ({node.op_type})"
        if not schema.min_input <= len(node.inputs) <= schema.max_input:
            limits = f"{schema.min_input}-{schema.max_input}"
            yield f"{where} has {len(node.inputs)} inputs, not {limits}"
        if not schema.min_output <= len(node.outputs) <= schema.max_output:
            yield f"{where} has {len(node.outputs)} outputs"
        for name in node.attributes:
            if name not in schema.attributes:
                yield f"{where} has an unknown attribute {name!r}"
        for name, wanted in schema.attributes.items():
            if wanted.required and name not in node.attributes:
                yield f"{where} lacks the attribute {name!r}"
        for text in _mixed_types(node, schema):
            yield f"{where} {text}"


def _mixed_types(node: ir.Node, schema: onnx.defs.OpSchema) -> Iterator[str]:
    """Inputs of different types where the schema gives them one type parameter."""
    parameters = {constraint.type_param_str for constraint in schema.type_constraints}
    first: dict[str, ir.Value] = {}
    for index, value in enumerate(node.inputs):
        formal = schema.inputs[min(index, len(schema.inputs) - 1)]
        shared = formal.type_str in parameters and (
            formal.option != onnx.defs.OpSchema.FormalParameterOption.Variadic
            or formal.is_homogeneous
        )
        if value is None or value.type is None or value.dtype is None or not shared:
            continue
        other = first.setdefault(formal.type_str, value)
        if (type(other.type), other.dtype) != (type(value.type), value.dtype):
            yield (
                f"takes inputs of one type, but {other.name!r} is {_type_name(other)}"
                f" and {value.name!r} is {_type_name(value)}"
            )
            return


def _type_name(value: ir.Value) -> str:
    dtype = value.dtype.numpy().name if value.dtype is not None else "unknown"
    return dtype if isinstance(value.type, ir.TensorType) else f"a {type(value.type).__name__}"


def _state(graph: Graph) -> Iterator[str]:
    inputs = {v.name: v for v in graph.graph.inputs}
    outputs = {v.name: v for v in graph.graph.outputs}
    for item in graph.state:
        source, result = inputs.get(item.input), outputs.get(item.output)
        if source is None or result is None:
            missing = item.input if source is None else item.output
            yield f"state {item.name!r} names {missing!r}, which the graph does not have"
            continue
        if source.dtype is not None and result.dtype is not None and source.dtype != result.dtype:
            yield f"state {item.name!r} is {source.dtype} going in and {result.dtype} coming out"
        if source.shape is None or result.shape is None:
            continue
        if not len(source.shape) == len(result.shape) == len(item.axes):
            yield f"state {item.name!r} has {len(item.axes)} axes but rank {len(source.shape)}"
            continue
        for axis, (before, after) in enumerate(zip(source.shape, result.shape, strict=True)):
            static = isinstance(before, int) and isinstance(after, int)
            if axis != item.growth_axis and static and before != after:
                yield f"state {item.name!r} changes extent on axis {axis}: {before} to {after}"


RULES: tuple[Rule, ...] = (_values, _ops, _state)
