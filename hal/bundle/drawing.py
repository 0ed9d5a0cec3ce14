"""A build's graph as a page of HTML, coloured by what runs each node."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jinja2
import networkx as nx
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from hal.bundle.build import FALLBACK_BACKEND
from hal.bundle.manifest import BuildRecord
from hal.descriptor import parse
from hal.ir import Graph, to_networkx, value_bytes
from hal.targets import ResolvedTarget, load_backend, partition

_COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#e15759", "#76b7b2", "#9c755f", "#edc948")
_WIDTH, _HEIGHT, _GAP_X, _GAP_Y, _MARGIN = 132, 22, 14, 26, 20


@dataclasses.dataclass(frozen=True)
class Box:
    """A node where it is drawn."""

    x: int
    y: int
    op: str
    title: str
    where: str


@dataclasses.dataclass(frozen=True)
class Line:
    """An edge between two boxes; ``crosses`` says that it leaves what runs its source."""

    x1: int
    y1: int
    x2: int
    y2: int
    crosses: bool
    title: str


def page(graph: Graph, record: BuildRecord) -> str:
    """The page for a build of the neutral graph ``graph``. Stages stand side by side."""
    boxes: list[Box] = []
    lines: list[Line] = []
    right = 0
    for part, owners in _placed(graph, record):
        more, edges, width = _laid_out(part, owners, right)
        boxes += more
        lines += edges
        right += width + 3 * _GAP_X
    places = list(dict.fromkeys(box.where for box in boxes))
    colours = {place: _COLOURS[i % len(_COLOURS)] for i, place in enumerate(places)}
    counts = {place: sum(box.where == place for box in boxes) for place in places}
    bottom = max((box.y for box in boxes), default=0) + _HEIGHT + _MARGIN
    return jinja2.Environment(autoescape=True).from_string(_PAGE).render(
        name=graph.name, target=record.target, summary=record.placement["summary"],
        moved=record.placement["moved_bytes"], refused=record.placement["refused"], boxes=boxes,
        lines=lines, colours=colours, counts=counts, width=right + _MARGIN, height=bottom,
        box_width=_WIDTH, box_height=_HEIGHT,
    )  # fmt: skip


def _placed(graph: Graph, record: BuildRecord) -> Iterable[tuple[Graph, Mapping[ir.Node, str]]]:
    """Each stage as it was legalized, and what runs each of its nodes."""
    told = record.placement.get("stages")
    if not told:
        yield _owned(graph, _target(record.target, record.descriptor, record.route))
        return
    descriptors = {s["target"]: s["descriptor"] for s in record.segments}
    targets = [
        _target(stage["target"], descriptors[stage["target"]], stage["target"].split(":")[1])
        for stage in told
    ]
    rooms = [target.descriptor.memory_capacity() for target in targets]
    # The last one takes what was left, whatever it was refused then.
    parts = partition.stages(graph, [t.name for t in targets], [*rooms[:-1], None])
    for index, part in enumerate(parts):
        target = next(t for t in targets if t.name == part.backend)
        yield _owned(partition.extract(graph, part, f"stage{index}"), target)


def _target(name: str, descriptor: Mapping[str, Any], route: str) -> ResolvedTarget:
    described = parse(dict(descriptor), name)
    return ResolvedTarget(name.split(":")[0], described, *described.route(route))


def _owned(graph: Graph, target: ResolvedTarget) -> tuple[Graph, Mapping[ir.Node, str]]:
    backend = load_backend(target.backend)
    legal = backend.legalize(graph.clone(), target.descriptor)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(legal.model)
    owners = {}
    for node in legal.graph:
        claimed = backend.supports(node, target.descriptor).claimed
        owners[node] = target.name if claimed else f"host ({FALLBACK_BACKEND})"
    return legal, owners


def _laid_out(
    graph: Graph, owners: Mapping[ir.Node, str], left: int
) -> tuple[list[Box], list[Line], int]:
    """Boxes in layers from top to bottom, each node below all that it reads."""
    view = to_networkx(graph)
    nodes = view.subgraph([v for v in view if isinstance(v, ir.Node)])
    at: dict[ir.Node, Box] = {}
    width = 0
    for depth, layer in enumerate(nx.topological_generations(nodes)):
        for column, node in enumerate(layer):
            x = left + _MARGIN + column * (_WIDTH + _GAP_X)
            y = _MARGIN + depth * (_HEIGHT + _GAP_Y)
            op = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            shapes = ", ".join(f"{v.name} {v.shape}" for v in node.outputs)
            at[node] = Box(x, y, op, f"{node.name}: {owners[node]}\n{shapes}", owners[node])
            width = max(width, x + _WIDTH - left)
    lines = [
        Line(
            at[a].x + _WIDTH // 2, at[a].y + _HEIGHT, at[b].x + _WIDTH // 2, at[b].y,
            owners[a] != owners[b], f"{edge['value'].name}: {value_bytes(edge['value'])} bytes",
        )
        for a, b, edge in nodes.edges(data=True)
    ]  # fmt: skip
    return list(at.values()), lines, width


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{{ name }} on {{ target }}</title>
<style>
body { font: 14px/1.4 system-ui, sans-serif; margin: 1.5em; }
svg text { font: 11px system-ui, sans-serif; fill: #fff; pointer-events: none; }
path { fill: none; stroke: #999; } path.crosses { stroke: #d00; stroke-width: 2; }
.key span { display: inline-block; color: #fff; padding: .1em .6em; margin-right: .5em; }
</style>
<h1>{{ name }} on {{ target }}</h1>
<p>{{ summary }}; {{ moved }} bytes move between parts (dynamic dims counted as 1).</p>
<p class="key">{% for place, colour in colours.items() %}<span style="background: {{ colour }}">
{{- place }}: {{ counts[place] }}</span>{% endfor %}</p>
{% if refused %}<ul>{% for r in refused %}<li>{{ r.count }} × {{ r.op }}: {{ r.reason }}</li>
{% endfor %}</ul>{% endif %}
<svg width="{{ width }}" height="{{ height }}" xmlns="http://www.w3.org/2000/svg">
{% for l in lines %}<path {% if l.crosses %}class="crosses" {% endif -%}
d="M{{ l.x1 }} {{ l.y1 }} C{{ l.x1 }} {{ l.y1 + 20 }}
{{- " " }}{{ l.x2 }} {{ l.y2 - 20 }} {{ l.x2 }} {{ l.y2 }}">
<title>{{ l.title }}</title></path>
{% endfor %}{% for b in boxes %}<g><title>{{ b.title }}</title>
<rect x="{{ b.x }}" y="{{ b.y }}" rx="3" width="{{ box_width }}" height="{{ box_height }}"
fill="{{ colours[b.where] }}"/>
<text x="{{ b.x + 6 }}" y="{{ b.y + 15 }}">{{ b.op[:22] }}</text></g>
{% endfor %}</svg>
</html>
"""
