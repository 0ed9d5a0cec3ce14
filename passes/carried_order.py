"""States of fixed size in the order of axes in which they are used."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from hal.ir import Graph, State
from hal.passes._edit import attribute, is_op, producer, remove_unused
from hal.passes.base import Outcome, Pass


@dataclasses.dataclass(frozen=True)
class CarriedOrder(Pass):
    """Carry a state the way it is computed with, if a step transposes it to that and back.

    Preserves results bit for bit. The state's axes change places, its labels with them.
    """

    name: ClassVar[str] = "carried_order"

    def run(self, graph: Graph) -> Outcome:
        """Drop the transposes of each state of fixed size; ``states`` names those."""
        done = [s.name for s in graph.state if s.growth_axis is None and _reorder(graph, s)]
        remove_unused(graph)
        return Outcome(len(done), {"states": done})


def _reorder(graph: Graph, state: State) -> bool:
    past = next(v for v in graph.graph.inputs if v.name == state.input)
    present = next(v for v in graph.graph.outputs if v.name == state.output)
    last = producer(present, "Transpose")
    extents = {n for n, _ in past.uses() if is_op(n, "Shape")}
    reads = {n for n, _ in past.uses()} - extents
    orders = {tuple(attribute(n, "perm", ())) for n in reads if is_op(n, "Transpose")}
    if last is None or present.uses() or past.shape is None or len(orders) != 1:
        return False
    (order,) = orders
    back = attribute(last, "perm", ())
    core = last.inputs[0]
    if (
        not all(is_op(n, "Transpose") for n in reads)
        or not order
        or [back[i] for i in order] != list(range(len(order)))
        or not all(_survives(n, order) for n in extents)
        or core is None
        or core.producer() is None
        or core.is_graph_output()
    ):
        return False
    past.shape = ir.Shape([past.shape[i] for i in order])
    for node in reads:
        node.outputs[0].replace_all_uses_with(past, replace_graph_outputs=False)
    name, graph.graph.outputs[graph.graph.outputs.index(present)] = present.name, core
    present.name, core.name = f"{name}/transposed", name
    core.type, core.shape = past.type, past.shape
    carried = dataclasses.replace(state, axes=tuple(state.axes[i] for i in order))
    graph.state = tuple(carried if s is state else s for s in graph.state)
    return True


def _survives(node: ir.Node, order: tuple[int, ...]) -> bool:
    """Whether a ``Shape`` reads extents of axes only that keep their place."""
    end = attribute(node, "end", len(order))
    start = attribute(node, "start", 0)
    return start >= 0 and end >= 0 and all(order[i] == i for i in range(start, end))
