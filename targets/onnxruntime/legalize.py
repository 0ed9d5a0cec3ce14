"""From the neutral graph to what the installed ONNX Runtime really has kernels for.

Three means, cheapest first: stamp the model with the operator-set version whose kernels fit, cast
around a kernel that lacks a dtype, inline the body of an op that has no kernel. The version is one
for the whole model, so it is chosen to leave the fewest nodes without a kernel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import onnx
import onnx_ir as ir

from hal.errors import GraphError
from hal.ir import Graph
from hal.ir.cache_plan import ALIAS_KEY, FIXED_KEY, plan_of
from hal.ir.inline import infer_types, inline_functions, may_have_body
from hal.targets.onnxruntime import fuse
from hal.targets.onnxruntime.cached_attention import fuse_cached_attention
from hal.targets.onnxruntime.kernels import NEWEST, KernelTable, Match, Miss, kernel_table
from hal.targets.onnxruntime.opset import OLDEST, Restatement, restate

ORIGIN = "hal.origin"
"""Node metadata: the op whose body a node came from, for messages."""

_MAX_ROUNDS = 24
_CAST_COST, _BODY_COST, _MISSING_COST = 1, 50, 1_000_000


@dataclasses.dataclass(frozen=True)
class Assessment:
    """How one node fares at one operator-set version: one of the three means, or a reason."""

    cost: int
    match: Match | None = None
    restatement: Restatement | None = None
    inline: bool = False
    reason: str = ""


def legalize(graph: Graph, other: KernelTable | None = None) -> Graph:
    """Rewrite a copy of ``graph`` so that as many nodes as possible have a kernel.

    Inputs, outputs and state keep their names. A node that nothing covers stays as it is, for
    :func:`uncovered` to name. Legalizing twice changes nothing.

    ``other``: the kernels of another build of the runtime than the installed one. The ops that
    this one alone has are not used then.
    """
    model = graph.model.clone()
    if _lacks_types(model):
        infer_types(model)
    table = other or kernel_table()
    if other is None:
        fuse.fuse(model)
    metadata, plan = dict(graph.metadata), plan_of(graph)
    if other is None and plan is not None and plan.layout == "contiguous" and not plan.bits:
        added = fuse_cached_attention(model)
        if any(n.op_type == "GroupQueryAttention" for n in model.graph):
            metadata[ALIAS_KEY] = {**metadata.get(ALIAS_KEY, {}), **added}
            metadata[FIXED_KEY] = True
    model, version = _inline_what_lacks_kernels(model, table)
    _stamp(model, version, table)
    _enter_loops_with_scalars(model)
    _name_presents(model)
    used = {node.op_identifier() for node in model.graph.all_nodes()}
    for identifier in [i for i in model.functions if i not in used]:
        del model.functions[identifier]
    domains = {node.domain for node in model.graph.all_nodes()} | {""}
    for domain in [d for d in model.opset_imports if d not in domains]:
        del model.opset_imports[domain]
    return Graph(model, graph.state, metadata)


def uncovered(model: ir.Model) -> Iterator[tuple[ir.Node, str]]:
    """Nodes of a legalized model that have no kernel, each with the reason."""
    version = _current(model)
    for node in model.graph.all_nodes():
        found = assess(model, node, version, version, kernel_table())
        if found.match is None or found.match.casts:
            yield node, found.reason or "its kernel lacks the dtype"


def assess(
    model: ir.Model, node: ir.Node, current: int, version: int, table: KernelTable
) -> Assessment:
    """How ``node`` of a model at opset ``current`` would fare in opset ``version``."""
    if node.op_identifier() in model.functions:
        return Assessment(_BODY_COST, inline=True)
    target = version if node.domain == "" else model.opset_imports.get(node.domain, 1)
    restated = restate(node, current, version)
    if isinstance(restated, Restatement):
        found = _misleading(node) or table.match(node, target)
        if isinstance(found, Match):
            cost = _CAST_COST if found.casts else 0
            return Assessment(cost, match=found, restatement=restated)
        reason = found.reason
    else:
        reason = restated
    if may_have_body(model, node):
        return Assessment(_BODY_COST, inline=True, reason=f"{reason}, and its body does not apply")
    origin = node.metadata_props.get(ORIGIN)
    tail = f" (in the body of {origin})" if origin else ""
    return Assessment(_MISSING_COST, reason=f"{reason}, and ONNX defines no body for it{tail}")


def _misleading(node: ir.Node) -> Miss | None:
    """Nodes whose kernel does not do all that the op says."""
    if node.op_type == "Attention" and not node.domain:
        if len(node.outputs) > 3 and node.outputs[3].name:
            return Miss("onnxruntime's Attention masks its qk_matmul_output otherwise")
        if _has_short_mask(node):
            return Miss("onnxruntime's Attention takes no mask shorter than the keys")
    return None


def _has_short_mask(node: ir.Node) -> bool:
    """Whether the mask is known to cover fewer positions than there are keys."""
    inputs = [*node.inputs, *([None] * 6)]
    key, mask, past = inputs[1], inputs[3], inputs[4]
    if mask is None or key is None or not mask.shape or not key.shape:
        return False
    axis = len(key.shape) - 2
    lengths: list[object] = [mask.shape[-1], key.shape[axis]]
    if past is not None:
        lengths.append(past.shape[2] if past.shape else None)
    if not all(isinstance(n, int) for n in lengths):
        return False
    covered, *positions = lengths
    return covered != sum(n for n in positions if isinstance(n, int))


def _inline_what_lacks_kernels(model: ir.Model, table: KernelTable) -> tuple[ir.Model, int]:
    """Inline bodies until every node has a kernel or no body; also the version to stamp."""
    bodiless: set[tuple[object, ...]] = set()
    for _ in range(_MAX_ROUNDS):
        if _lacks_types(model):
            infer_types(model)
        version = _choose_version(model, _current(model), table)
        lacks_kernel = _Chooser(model, version, frozenset(bodiless), table)
        chosen = [node for node in model.graph.all_nodes() if lacks_kernel(node)]
        if not chosen:
            return model, version
        tried = {_identity(node) for node in chosen}
        model = inline_functions(model, lacks_kernel)
        bodiless |= tried & {_identity(node) for node in model.graph.all_nodes()}
    raise GraphError(
        f"the function bodies of {model.graph.name!r} do not come to an end",
        "a body contains the op that it defines",
    )


@dataclasses.dataclass(frozen=True)
class _Chooser:
    """Says which nodes to inline, and notes on each where its nodes will come from."""

    model: ir.Model
    version: int
    bodiless: frozenset[tuple[object, ...]]
    table: KernelTable

    def __call__(self, node: ir.Node) -> bool:
        found = assess(self.model, node, _current(self.model), self.version, self.table)
        if not found.inline or _identity(node) in self.bodiless:
            return False
        node.metadata_props.setdefault(ORIGIN, _label(node))
        return True


def _lacks_types(model: ir.Model) -> bool:
    return any(v.type is None for n in model.graph.all_nodes() for v in n.inputs if v is not None)


def _identity(node: ir.Node) -> tuple[object, ...]:
    return (node.domain, node.op_type, *(value.name for value in node.outputs))


def _choose_version(model: ir.Model, current: int, table: KernelTable) -> int:
    """The version with the least total cost; ties go to the current one, then to the newest."""
    nodes: dict[tuple[object, ...], tuple[ir.Node, int]] = {}
    for node in model.graph.all_nodes():
        if node.domain == "":
            key = _signature(node)
            nodes[key] = (node, nodes[key][1] + 1 if key in nodes else 1)
    oldest = min(OLDEST, table.newest)
    versions = dict.fromkeys((current, *range(table.newest, oldest - 1, -1)))
    candidates = [v for v in versions if v <= table.newest]
    best: int = candidates[0]
    best_cost: int | None = None
    for version in candidates:
        cost = 0
        for node, count in nodes.values():
            cost += count * assess(model, node, current, version, table).cost
            if best_cost is not None and cost >= best_cost:
                break
        if best_cost is None or cost < best_cost:
            best, best_cost = version, cost
        if best_cost == 0:
            break
    return best


def _signature(node: ir.Node) -> tuple[object, ...]:
    """What decides whether a kernel fits: nodes that agree in it fare alike."""
    scalars = tuple(
        (name, str(attr.value))
        for name, attr in sorted(node.attributes.items())
        if attr.type in (ir.AttributeType.INT, ir.AttributeType.STRING, ir.AttributeType.FLOAT)
    )
    others = tuple(sorted(node.attributes))
    types = tuple(str(v.type) if v is not None else "" for v in (*node.inputs, *node.outputs))
    return (node.op_type, scalars, others, types, len(node.inputs))


def _stamp(model: ir.Model, version: int, table: KernelTable) -> None:
    current = _current(model)
    casts = _Casts(model)
    for node in list(model.graph.all_nodes()):
        if node.domain != "":
            continue
        found = assess(model, node, current, version, table)
        if found.restatement is not None:
            found.restatement.apply(node)
        if found.match is not None and found.match.casts:
            casts.around(node, found.match, version)
    model.opset_imports[""] = version
    model.graph.opset_imports[""] = version


def _enter_loops_with_scalars(model: ir.Model) -> None:
    """Make the condition of a ``Loop`` a scalar where its body says that it is one.

    ONNX allows a condition of shape ``[1]`` as well; onnxruntime then refuses the body's type.
    """
    for node in list(model.graph.all_nodes()):
        condition = node.inputs[1] if node.op_type == "Loop" and len(node.inputs) > 1 else None
        if node.domain or condition is None or not condition.shape:
            continue
        wanted = node.attributes["body"].as_graph().inputs[1].shape
        if wanted is None or len(wanted) != 0:
            continue
        scalar = ir.Node("", "Squeeze", [condition])
        result = scalar.outputs[0]
        result.name = f"{node.outputs[0].name}/condition"
        result.type, result.shape = condition.type, wanted
        assert node.graph is not None
        node.graph.insert_before(node, scalar)
        node.replace_input_with(1, result)


def _name_presents(model: ir.Model) -> None:
    """Give ``Attention`` with past keys and values all its outputs; the kernel insists on them."""
    for node in model.graph.all_nodes():
        if node.op_type != "Attention" or node.domain or len(node.inputs) < 6:
            continue
        if node.inputs[4] is None and node.inputs[5] is None:
            continue
        node.resize_outputs(max(3, len(node.outputs)))
        for value, kind in zip(node.outputs[1:3], ("key", "value"), strict=True):
            if not value.name:
                value.name = f"{node.outputs[0].name}/present_{kind}"
                value.type = node.outputs[0].type


class _Casts:
    """Puts casts around nodes; a value cast twice to one dtype is cast once."""

    def __init__(self, model: ir.Model) -> None:
        self._done: dict[tuple[ir.Value, ir.DataType, ir.Graph], ir.Value] = {}
        self._model = model

    def around(self, node: ir.Node, match: Match, version: int) -> None:
        """Cast the inputs of the parameters that ``match`` names, and cast their outputs back."""
        schema = onnx.defs.get_schema(node.op_type, version)
        for index, value in enumerate(list(node.inputs)):
            dtype = _wanted(schema.inputs, index, match)
            if value is not None and dtype is not None and value.dtype not in (None, dtype):
                node.replace_input_with(index, self._cast(value, dtype, node))
        for index, value in enumerate(list(node.outputs)):
            dtype = _wanted(schema.outputs, index, match)
            if dtype is not None and value.dtype not in (None, dtype):
                _cast_back(node, value, dtype)

    def _cast(self, value: ir.Value, dtype: ir.DataType, node: ir.Node) -> ir.Value:
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        key = (value, dtype, graph)
        if key not in self._done:
            cast = _cast_node(value, dtype, f"{value.name}/{node.name or node.op_type}/wide")
            graph.insert_before(node, cast)
            self._done[key] = cast.outputs[0]
        return self._done[key]


def _cast_back(node: ir.Node, value: ir.Value, dtype: ir.DataType) -> None:
    original, name = value.dtype, value.name
    assert original is not None
    value.name = f"{name}/wide"
    value.dtype = dtype
    cast = _cast_node(value, original, name)
    ir.convenience.replace_all_uses_with(value, cast.outputs[0], replace_graph_outputs=True)
    cast.outputs[0].name = name
    cast.replace_input_with(0, value)
    assert node.graph is not None
    node.graph.insert_after(node, cast)


def _cast_node(value: ir.Value, dtype: ir.DataType, name: str | None) -> ir.Node:
    cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", dtype.value)], name=f"{name}/Cast")
    result = cast.outputs[0]
    result.name, result.shape, result.type = name, value.shape, ir.TensorType(dtype)
    return cast


def _wanted(
    formals: Sequence[onnx.defs.OpSchema.FormalParameter], index: int, match: Match
) -> ir.DataType | None:
    if not formals:
        return None
    formal = formals[min(index, len(formals) - 1)]
    return match.casts.get(formal.type_str) or match.casts.get(formal.name)


def _label(node: ir.Node) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def _current(model: ir.Model) -> int:
    return int(model.opset_imports.get("", NEWEST))
