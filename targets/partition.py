"""Who runs which node: claims become convex segments that run one after the other.

Where a backend refuses nodes, a minimum cut decides which of the claimed ones go to the host with
them: an activation between two refused products is not worth two moves of its tensor.

Nodes are taken in a topological order that stays with one backend while any of its nodes is ready,
so segments are few and each is convex by construction (all it needs was computed earlier).
Of the orders that start with either backend, the one that moves fewer bytes is kept.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import networkx as nx
import onnx_ir as ir

from hal.errors import UnsupportedError
from hal.ir import Graph, used_values, value_bytes
from hal.targets.backend import Verdict


@dataclasses.dataclass(frozen=True)
class Segment:
    """Nodes that one backend runs together, with the values that cross its border."""

    backend: str
    nodes: tuple[ir.Node, ...]
    inputs: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Segments in running order, and why each unclaimed node was refused."""

    backend: str
    segments: tuple[Segment, ...]
    refusals: tuple[tuple[ir.Node, str], ...]
    total: int

    def placement(self) -> dict[str, Any]:
        """JSON-ready: counts per backend, refusals grouped by op and reason, bytes moved."""
        counts: collections.Counter[str] = collections.Counter()
        for segment in self.segments:
            counts[segment.backend] += len(segment.nodes)
        groups: dict[tuple[str, str], list[str]] = {}
        for node, reason in self.refusals:
            groups.setdefault((_op(node), reason), []).append(node.name or "")
        return {
            "backend": self.backend,
            "nodes": self.total,
            "assigned": dict(counts),
            "summary": self.summary(),
            "segments": len(self.segments),
            "moved_bytes": moved_bytes(self.segments),
            "refused": [
                {"op": op, "reason": reason, "count": len(names), "nodes": names[:8]}
                for (op, reason), names in groups.items()
            ],
        }

    def summary(self) -> str:
        """``assigned 398/412 nodes to tvm (96.6 %)``."""
        mine = sum(len(s.nodes) for s in self.segments if s.backend == self.backend)
        share = 100.0 * mine / self.total if self.total else 100.0
        return f"assigned {mine}/{self.total} nodes to {self.backend} ({share:.1f} %)"


def plan(
    graph: Graph,
    backend: str,
    verdicts: dict[ir.Node, Verdict],
    fallback: str | None,
    *,
    movable: Callable[[ir.Node], bool] = lambda _: False,
    move_cost: float = 1.0,
) -> Plan:
    """Arrange the top-level nodes of a legalized graph into segments.

    Args:
        graph: the legalized graph.
        backend: name of the backend that gave the verdicts.
        verdicts: an answer for every top-level node.
        fallback: backend for refused nodes, or None to make a refusal an error.
        movable: whether the fallback could run a claimed node as well.
        move_cost: see :func:`cheaper_on_host`.

    Raises:
        UnsupportedError: nodes were refused and there is no fallback; lists node, op and reason.
    """
    nodes = list(graph.graph)
    refused = {n: verdicts[n].reason for n in nodes if not verdicts[n].claimed}
    if fallback is None:
        require_all(refused.items(), backend)
    elif 0 < len(refused) < len(nodes):
        left = cheaper_on_host(graph, set(refused), movable, move_cost)
        refused |= dict.fromkeys((n for n in nodes if n in left), _CHEAPER)
    refusals = tuple((n, refused[n]) for n in nodes if n in refused)
    owner = {n: fallback or backend if n in refused else backend for n in nodes}
    orders = [_order(nodes, owner, first) for first in dict.fromkeys(owner.values())] or [[]]
    candidates = [_cut(graph, order) for order in orders]
    best = min(candidates, key=lambda segments: (moved_bytes(segments), len(segments)))
    return Plan(backend, tuple(best), refusals, len(nodes))


_CHEAPER = "moving its tensors to the target and back costs more than it costs on the host"


def cheaper_on_host(
    graph: Graph, refused: set[ir.Node], movable: Callable[[ir.Node], bool], move_cost: float
) -> set[ir.Node]:
    """Claimed nodes that cost less beside the refused ones than the moves they cause.

    A node on the host costs the bytes that it reads and writes. A tensor that crosses is read and
    written once more, which counts ``move_cost`` times: how much slower the way between the two is
    than memory. The minimum cut between target and host has the least sum. What enters and leaves
    the graph moves in any case. Dynamic dims count as 1, weights as they are. Nodes that touch
    carried state stay, or the state would move.
    """
    nodes = list(graph.graph)
    state = {s.input for s in graph.state} | {s.output for s in graph.state}
    users: dict[ir.Value, list[ir.Node]] = collections.defaultdict(list)
    cut = nx.DiGraph()
    cut.add_nodes_from(("target", "host"))
    for node in nodes:
        used = [*used_values(node)]
        for value in used:
            users[value].append(node)
        touched = [*used, *node.outputs]
        if node in refused:
            cut.add_edge(node, "host")  # without a capacity: never cut
        elif not movable(node) or any(v.name in state for v in touched):
            cut.add_edge("target", node)
        else:
            # One more: where both cost the same, the target was asked for.
            cut.add_edge("target", node, capacity=1 + sum(map(value_bytes, touched)))
    known = set(nodes)
    for value, readers in users.items():
        maker = value.producer()
        if maker is None or maker not in known:
            continue
        # Two helpers a tensor: however many of its readers are across, it moves once.
        cost = 2 * move_cost * value_bytes(value)
        there, back = ("there", value), ("back", value)
        cut.add_edge(maker, there, capacity=cost)
        cut.add_edge(back, maker, capacity=cost)
        for reader in readers:
            cut.add_edge(there, reader)
            cut.add_edge(reader, back)
    _, (_, host) = nx.minimum_cut(cut, "target", "host")
    return {n for n in nodes if n in host and n not in refused}


def stages(graph: Graph, names: Sequence[str], rooms: Sequence[float | None]) -> list[Segment]:
    """Cut a graph into consecutive parts whose weights fit into the memories of several chips.

    Each chip gets as many nodes as its ``rooms`` (bytes; None: unknown, no limit) allow. Of the
    cuts that leave it no less than :data:`_FULL` of that, the one across which the fewest bytes
    move is taken. Chips for which nothing is left get no part.

    Raises:
        UnsupportedError: the weights fit into all of them together by no cut; says by how much.
    """
    nodes = list(graph.graph)
    order: list[tuple[str, list[ir.Node]]] = []
    start = 0
    for index, (name, room) in enumerate(zip(names, rooms, strict=True)):
        end, held = _reach(nodes, start, room)
        if end < len(nodes) and index == len(names) - 1:
            _, rest = _reach(nodes, end, None)
            raise UnsupportedError(
                f"the weights do not fit: {rest / 2**20:.2f} MiB are left when "
                f"{' and '.join(names)} are full",
                "quantize further, or add a target: --target A+B+C",
            )
        if end < len(nodes):
            end = _narrowest(graph, nodes, start, end, held)
        if end > start:
            order.append((name, nodes[start:end]))
        start = end
    return _cut(graph, order)


_FULL = 0.7
"""Share of a memory below which a cut is not moved back for the sake of fewer bytes."""


def _reach(nodes: Sequence[ir.Node], start: int, room: float | None) -> tuple[int, float]:
    """The end of the longest run from ``start`` whose weights fit, and their bytes."""
    seen: set[ir.Value] = set()
    held = 0.0
    for index in range(start, len(nodes)):
        fresh = {v for v in used_values(nodes[index]) if v.const_value is not None} - seen
        more = sum(v.const_value.nbytes for v in fresh if v.const_value is not None)
        if room is not None and held + more > room:
            return index, held
        held += more
        seen |= fresh
    return len(nodes), held


def _narrowest(graph: Graph, nodes: list[ir.Node], start: int, end: int, held: float) -> int:
    """The cut at most at ``end`` across which the fewest bytes move."""
    best, least = end, None
    for place in range(end, start, -1):
        if place < end and _reach(nodes[:place], start, None)[1] < _FULL * held:
            break
        moved = moved_bytes(_cut(graph, [("", nodes[:place]), ("rest", nodes[place:])]))
        if least is None or moved < least:
            best, least = place, moved
    return best


def require_all(refusals: Iterable[tuple[ir.Node, str]], where: str) -> None:
    """Make refused nodes an error.

    Raises:
        UnsupportedError: there are any; lists op, node and what was tried.
    """
    items = list(refusals)
    if items:
        raise UnsupportedError(
            f"{len(items)} {'node' if len(items) == 1 else 'nodes'} cannot run on {where}: "
            f"{describe(items)}",
            "allow fallback, choose another target, or give the op a function body",
        )


def describe(refusals: Iterable[tuple[ir.Node, str]], limit: int = 8) -> str:
    """``Op (node 'a'): reason; Op (node 'b'): reason``, cut after ``limit`` entries."""
    items = list(refusals)
    text = "; ".join(f"{_op(n)} (node {n.name!r}): {reason}" for n, reason in items[:limit])
    return text + (f"; and {len(items) - limit} more" if len(items) > limit else "")


def moved_bytes(segments: Iterable[Segment]) -> int:
    """Bytes that cross between segments, dynamic dims counted as 1."""
    items = list(segments)
    made = {v: i for i, s in enumerate(items) for v in s.outputs}
    return sum(value_bytes(v) for i, s in enumerate(items) for v in s.inputs if made.get(v, i) != i)


def _op(node: ir.Node) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def _order(
    nodes: list[ir.Node], owner: dict[ir.Node, str], first: str
) -> list[tuple[str, list[ir.Node]]]:
    """List scheduling: stay with one backend while it has ready nodes, then switch."""
    waiting: dict[ir.Node, int] = {}
    users: dict[ir.Node, list[ir.Node]] = {n: [] for n in nodes}
    position = {n: i for i, n in enumerate(nodes)}
    for node in nodes:
        makers = {v.producer() for v in used_values(node)} - {None}
        makers = {m for m in makers if m in position}
        waiting[node] = len(makers)
        for maker in makers:
            users[maker].append(node)  # type: ignore[index]
    ready: dict[str, collections.deque[ir.Node]] = collections.defaultdict(collections.deque)
    for node in nodes:
        if waiting[node] == 0:
            ready[owner[node]].append(node)
    result: list[tuple[str, list[ir.Node]]] = []
    current = first
    while any(ready.values()):
        if not ready[current]:
            current = next(name for name, queue in ready.items() if queue)
        group: list[ir.Node] = []
        while ready[current]:
            node = ready[current].popleft()
            group.append(node)
            for user in users[node]:
                waiting[user] -= 1
                if waiting[user] == 0:
                    ready[owner[user]].append(user)
        result.append((current, sorted(group, key=position.__getitem__)))
    return result


def _cut(graph: Graph, order: list[tuple[str, list[ir.Node]]]) -> list[Segment]:
    final = set(graph.graph.outputs)
    home = {node: i for i, (_, group) in enumerate(order) for node in group}
    needed: dict[ir.Value, set[int]] = collections.defaultdict(set)
    for index, (_, group) in enumerate(order):
        for node in group:
            for value in used_values(node):
                needed[value].add(index)
    segments: list[Segment] = []
    for index, (backend, group) in enumerate(order):
        inputs = dict.fromkeys(
            v
            for node in group
            for v in used_values(node)
            if not v.is_initializer() and _home(v, home) != index
        )
        outputs = dict.fromkeys(
            v for node in group for v in node.outputs if v in final or needed[v] - {index}
        )
        segments.append(Segment(backend, tuple(group), tuple(inputs), tuple(outputs)))
    return segments


def _home(value: ir.Value, home: dict[ir.Node, int]) -> int:
    producer = value.producer()
    return home[producer] if producer is not None and producer in home else -1


def extract(graph: Graph, segment: Segment, name: str) -> Graph:
    """The segment as a graph of its own; weights are shared, functions are kept."""
    captured = dict.fromkeys(v for node in segment.nodes for v in used_values(node))
    view = ir.GraphView(
        segment.inputs,
        segment.outputs,
        nodes=segment.nodes,
        initializers=[v for v in captured if v.is_initializer()],
        opset_imports=graph.graph.opset_imports,
        name=name,
    )
    model = ir.Model(
        view.clone(),
        ir_version=graph.model.ir_version,
        functions=[f.clone() for f in graph.model.functions.values()],
    )
    names_in = {v.name for v in segment.inputs}
    names_out = {v.name for v in segment.outputs}
    state = tuple(s for s in graph.state if s.input in names_in and s.output in names_out)
    return Graph(model, state, dict(graph.metadata))
