"""What inlined bodies leave: constants to compute, the same twice, parts of no extent."""

from __future__ import annotations

from hal.ir import Graph
from hal.ir.inline import infer_types
from hal.passes.cse import CommonSubexpressions
from hal.passes.fold import Fold
from hal.passes.identity import RemoveIdentities


def simplify(graph: Graph) -> None:
    """Rewrite ``graph`` in place for software that is asked for nodes one by one.

    Preserves all results; what shapes and constants decide is decided, and shapes are known where
    they can be.
    """
    infer_types(graph.model)
    Fold().run(graph)
    infer_types(graph.model)
    RemoveIdentities().run(graph)
    CommonSubexpressions().run(graph)
    infer_types(graph.model)
