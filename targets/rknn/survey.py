"""Which nodes of a graph the chip runs: the toolkit is asked, and what it says is read.

It lists no ops that it supports. So the segments are built, as they will be: what it cannot build
is looked for node by node, and what it would run on the board's processor is taken from it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import onnx_ir as ir

from hal.ir import Graph, used_values
from hal.targets.backend import Verdict
from hal.targets.partition import Segment, extract, plan
from hal.targets.rknn.plain import CODED

MINE, HOST = "rknn", "host"
KEPT = ("Reshape",)
"""Layers on the processor that compute nothing; the toolkit puts them around others by itself."""

_CODES = (ir.DataType.INT8, ir.DataType.UINT8)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the toolkit makes of a graph: a program's layers, or why there is none.

    A layer is its operator, dtype, place, and what it is named after.
    """

    layers: Sequence[Sequence[str]] = ()
    refused: str = ""


Build = Callable[[Graph], Answer]


def survey(
    graph: Graph, build: Build, known: Mapping[ir.Node, str] = MappingProxyType({})
) -> dict[ir.Node, str]:
    """Why each node that is not for the chip is not; ``known`` are some of them."""
    reasons = {node: reason for node in graph.graph if (reason := _unfit(node))} | {**known}
    answers: dict[tuple[ir.Node, ...], Answer] = {}

    def asked(segment: Segment) -> Answer:
        if segment.nodes not in answers:
            answers[segment.nodes] = build(numbered(extract(graph, segment, "segment")))
        return answers[segment.nodes]

    while True:
        _keep_codes_together(graph, reasons)
        verdicts = {n: Verdict(n not in reasons, reasons.get(n, "")) for n in graph.graph}
        found: dict[ir.Node, str] = {}
        for segment in plan(graph, MINE, verdicts, HOST).segments:
            if segment.backend == MINE:
                found |= _refusals(graph, segment, asked)
        if not found:
            return reasons
        reasons |= found


def numbered(graph: Graph) -> Graph:
    """The graph, its nodes and their results named by places; layers are named after them."""
    for index, node in enumerate(graph.graph):
        node.name = f"n{index}"
        for place, value in enumerate(node.outputs):
            if value.name:
                value.name = f"n{index}o{place}"
    return graph


def on_processor(layers: Sequence[Sequence[str]]) -> list[str]:
    """Operators of the layers that the chip does not run."""
    return [operator for operator, _, place, _ in layers if place != "NPU"]


def _refusals(
    graph: Graph, segment: Segment, asked: Callable[[Segment], Answer]
) -> dict[ir.Node, str]:
    answer = asked(segment)
    if not answer.refused:
        return _left(segment, answer)
    found: dict[ir.Node, str] = {}
    for node in segment.nodes:
        if node.op_type in CODED:
            continue
        alone = _alone(graph, node)
        told = asked(alone)
        if told.refused:
            found[node] = f"rknn-toolkit2 refuses it: {told.refused}"
        else:
            found |= {n: why for n, why in _left(alone, told).items() if n is node}
    return found or _culprits(graph, segment, asked)


def _culprits(
    graph: Graph, segment: Segment, asked: Callable[[Segment], Answer]
) -> dict[ir.Node, str]:
    """The first node with which a segment is refused whose nodes are taken alone.

    Others that look the same (those of further layers) are expected to do the same.
    """
    good, bad, refused = 0, len(segment.nodes), asked(segment).refused
    while bad - good > 1:
        middle = (good + bad) // 2
        told = asked(_part(graph, segment.nodes[:middle])).refused
        good, bad, refused = (good, middle, told) if told else (middle, bad, refused)
    first = segment.nodes[bad - 1]
    reason = f"rknn-toolkit2 takes it alone, but not behind what comes before it: {refused}"
    return {n: reason for n in segment.nodes if _looks(n) == _looks(first)}


def _looks(node: ir.Node) -> tuple[object, ...]:
    """What nodes that do the same with different numbers have in common."""
    shapes = [None if v is None else (str(v.shape), v.is_initializer()) for v in node.inputs]
    return (node.op_type, node.domain, *shapes)


def _left(segment: Segment, answer: Answer) -> dict[ir.Node, str]:
    """Nodes that the program would run on the processor of the board."""
    found = {}
    for operator, _, place, after in answer.layers:
        number = re.match(r"n(\d+)", after)
        if place != "NPU" and operator not in KEPT and number:
            found[segment.nodes[int(number[1])]] = (
                f"rknn-toolkit2 runs {operator} on the processor, not on the NPU"
            )
    return found


def _alone(graph: Graph, node: ir.Node) -> Segment:
    """A node with what decodes its weights."""
    nodes = [n for v in node.inputs if v is not None and (n := _decoder(v)) is not None]
    return _part(graph, [*dict.fromkeys(nodes), node], ends=[node])


def _part(graph: Graph, nodes: Sequence[ir.Node], ends: Sequence[ir.Node] = ()) -> Segment:
    """Some nodes as a segment; ``ends``: those that others read, by default all that they do."""
    inside = set(nodes)
    made = {value for n in nodes for value in n.outputs}
    needed = dict.fromkeys(v for n in nodes for v in used_values(n) if v not in made)
    inputs = tuple(v for v in needed if not v.is_initializer())
    final = set(graph.graph.outputs)
    outputs = tuple(
        v
        for n in ends or nodes
        for v in n.outputs
        if v in final or any(ends or use.node not in inside for use in v.uses())
    )
    return Segment(MINE, tuple(nodes), inputs, outputs)


def _decoder(value: ir.Value) -> ir.Node | None:
    node = value.producer()
    if node is None or node.op_type != "DequantizeLinear":
        return None
    codes = node.inputs[0]
    return node if codes is not None and codes.is_initializer() else None


def _unfit(node: ir.Node) -> str:
    """What no program of the chip can hold, whatever the toolkit says."""
    if node.domain:
        return "rknn-toolkit2 has the ops of ONNX only"
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in _attributes(node)):
        return "programs of the NPU have no branches and no loops"
    values = [v for v in used_values(node) if not v.is_initializer()]
    for value in (*values, *node.outputs):
        if not value.name:
            continue
        if value.shape is None or not value.shape.is_static():
            return f"the shape of {value.name!r} is known only when it runs"
        if value in values and not value.shape:
            return f"{value.name!r} is a scalar, which the simulator does not take"
        codes = node.op_type in CODED and value.dtype in _CODES
        if value.dtype != ir.DataType.FLOAT and not codes:
            name = value.dtype.name.lower() if value.dtype is not None else "no known type"
            return f"{value.name!r} is {name}, and programs of the NPU take float32 (as float16)"
    return ""


def _attributes(node: ir.Node) -> list[ir.Attr]:
    return list(node.attributes.values())


def _keep_codes_together(graph: Graph, reasons: dict[ir.Node, str]) -> None:
    """Codes never cross from the chip to the host: what makes and reads them has one place."""
    changed = True
    while changed:
        changed = False
        for node in graph.graph:
            if node in reasons or node.op_type not in CODED:
                continue
            if reason := _torn(node, reasons):
                reasons[node] = reason
                changed = True


def _torn(node: ir.Node, reasons: dict[ir.Node, str]) -> str:
    readers = [use.node for use in node.outputs[0].uses()]
    if node.op_type == "QuantizeLinear":
        if node.outputs[0].is_graph_output() or any(
            n in reasons or n.op_type != "DequantizeLinear" for n in readers
        ):
            return "its codes are read outside of the NPU"
        return ""
    codes = node.inputs[0]
    maker = codes.producer() if codes is not None else None
    if codes is not None and codes.is_initializer():
        return "what reads it runs on the host" if any(n in reasons for n in readers) else ""
    if maker is None or maker in reasons:
        return "its codes are made outside of the NPU"
    return ""
