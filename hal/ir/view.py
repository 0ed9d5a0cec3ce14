"""A networkx view of a graph, for analyses that are graph algorithms (cuts, cones, liveness)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import networkx as nx
import onnx_ir as ir

from hal.ir.graph import Graph


def to_networkx(graph: Graph) -> nx.DiGraph:
    """Directed graph of the top-level nodes, inputs and initializers.

    Vertices are ``ir.Node`` objects, and ``ir.Value`` objects for graph inputs and initializers.
    An edge carries ``value`` (the ``ir.Value``) and ``bytes`` (see :func:`value_bytes`); where a
    node uses several values of one producer the bytes add up.
    """
    view: nx.DiGraph = nx.DiGraph()
    for value in [*graph.graph.inputs, *graph.graph.initializers.values()]:
        view.add_node(value)
    for node in graph.graph:
        view.add_node(node)
        for used in used_values(node):
            source = used.producer() or used
            size = value_bytes(used)
            if view.has_edge(source, node):
                view.edges[source, node]["bytes"] += size
            else:
                view.add_edge(source, node, value=used, bytes=size)
    return view


def used_values(node: ir.Node) -> Iterator[ir.Value]:
    """Values that a node reads from its own graph, those captured by its subgraphs included."""
    seen: set[ir.Value] = set()
    for value in node.inputs:
        if value is not None and value not in seen:
            seen.add(value)
            yield value
    for inner in subgraphs(node):
        for nested in inner.all_nodes():
            for value in nested.inputs:
                if value is not None and value.graph is node.graph and value not in seen:
                    seen.add(value)
                    yield value
        for value in inner.outputs:
            if value.graph is node.graph and value not in seen:
                seen.add(value)
                yield value


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """Graphs that a node holds as attributes (branches of If, bodies of Loop and Scan)."""
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def value_bytes(value: ir.Value, dynamic: int = 1) -> int:
    """Bytes of one value; dynamic dims count as ``dynamic``, elements of unknown dtype as 4."""
    if value.const_value is not None:
        return value.const_value.nbytes
    dims = value.shape if value.shape is not None else ()
    extents = (d if isinstance(d, int) else dynamic for d in dims)
    bits = value.dtype.bitwidth if value.dtype not in (None, ir.DataType.STRING) else 32
    return math.ceil(math.prod(extents) * bits / 8)
