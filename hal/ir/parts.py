"""A graph cut into parts that run one after the other, so that little is made of weights at a time.

What depends on nothing but weights (codes made floats, transposed) a runtime computes for the whole
graph before anything else, and holds it all. A part holds its own only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import onnx_ir as ir

from hal.ir.graph import Graph
from hal.ir.ops import ensure_functions
from hal.ir.view import used_values


def split(graph: Graph, outputs: Sequence[ir.Value], most: int) -> list[tuple[Graph, list[str]]]:
    """Parts with the names of what they give to later ones or as ``outputs``, in running order.

    No part makes more than ``most`` numbers of weights alone, unless it is for a single node;
    nothing is returned for a graph that makes no more. Weights are shared. What depends on weights
    only is made in each part that uses it.
    """
    fixed = fixed_nodes(graph)
    if sum(_made(node, fixed) for node in graph.graph) <= most:
        return []
    place = {node: i for i, node in enumerate(graph.graph)}
    order = [node for node in ancestors(outputs, ()) if node not in fixed]
    parts: list[dict[ir.Node, None]] = [{}]
    made = 0
    for node in order:
        own = sorted(_fixed_before(node, fixed), key=lambda n: place[n])
        new = sum(_made(n, fixed) for n in own if n not in parts[-1])
        if new and made and made + new > most:
            parts.append({})
            made, new = 0, sum(_made(n, fixed) for n in own)
        made += new
        parts[-1].update(dict.fromkeys([*own, node]))
    needed = set(outputs)
    found = []
    for part in reversed(parts):
        results = [v for n in part if n not in fixed for v in n.outputs if v in needed]
        inside = {v for n in part for v in n.outputs}
        needed |= {v for n in part for v in used_values(n) if v not in inside}
        live = {v.name or "" for v in needed - inside if not v.is_initializer()}
        names = [v.name or "" for v in results]
        found.append((segment(graph, list(part), live, results), names))
    return found[::-1]


def _fixed_before(node: ir.Node, fixed: set[ir.Node]) -> set[ir.Node]:
    """Nodes among ``fixed`` whose results lead to ``node``."""
    found: set[ir.Node] = set()
    todo = [node]
    while todo:
        makers = {v.producer() for v in used_values(todo.pop())}
        new = [n for n in makers if n is not None and n in fixed and n not in found]
        found.update(new)
        todo += new
    return found


def _made(node: ir.Node, fixed: set[ir.Node]) -> int:
    """Numbers that a node among ``fixed`` makes of weights for the others to read."""
    if node not in fixed:
        return 0
    read = (v for v in node.outputs if any(use.node not in fixed for use in v.uses()))
    return sum(math.prod(d for d in v.shape or (0,) if isinstance(d, int)) for v in read)


def ancestors(values: Iterable[ir.Value], live: Iterable[str]) -> list[ir.Node]:
    """Nodes that make ``values`` from those that are ``live``, in the order of the graph."""
    known = set(live)
    seen: set[ir.Node] = set()
    todo = [v for v in values if v.name not in known]
    while todo:
        node = todo.pop().producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [v for v in used_values(node) if v.name not in known]
    graph = next(iter(seen)).graph if seen else None
    return [node for node in graph if node in seen] if graph is not None else []


def fixed_nodes(graph: Graph) -> set[ir.Node]:
    """Nodes that depend on weights and constants only."""
    found: set[ir.Node] = set()
    for node in graph.graph:
        used = list(used_values(node))
        if all(v.is_initializer() or v.producer() in found for v in used):
            found.add(node)
    return found


def segment(
    graph: Graph, nodes: list[ir.Node], live: set[str], outputs: Sequence[ir.Value]
) -> Graph:
    """Nodes as a graph of their own; weights are shared."""
    used = dict.fromkeys(v for node in nodes for v in used_values(node))
    view = ir.GraphView(
        [v for v in used if v.name in live],
        list(outputs),
        nodes=nodes,
        initializers=[v for v in used if v.is_initializer() and v.name not in live],
        opset_imports=graph.graph.opset_imports,
        name="segment",
    )
    functions = [f.clone() for f in graph.model.functions.values()]
    model = ir.Model(view.clone(), ir_version=graph.model.ir_version, functions=functions)
    ensure_functions(model)
    return Graph(model)


__all__ = ["ancestors", "fixed_nodes", "segment", "split"]
