"""Shape inference with symbolic dims."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from hal.ir import Graph
from hal.passes._edit import all_values
from hal.passes._symbolic import analyse
from hal.passes.base import Outcome, Pass


@dataclasses.dataclass(frozen=True)
class InferShapes(Pass):
    """Write every value's shape and dtype, extents as expressions of the inputs' dims.

    Preserves everything else; functions of the ``hal`` domain are inferred through their bodies.
    No weight is read. Extents that depend on data stay unknown.
    """

    name: ClassVar[str] = "shapes"

    def run(self, graph: Graph) -> Outcome:
        """Refine shapes; ``details`` counts the values whose shape is not fully known."""
        found = analyse(graph)
        outputs = set(graph.graph.outputs)
        changed = unknown = 0
        for value in all_values(graph):
            shape = found.dims(value)
            if value.producer() is None:
                continue
            if shape is None or any(not isinstance(d, int) and d.value is None for d in shape):
                unknown += 1
            if shape is None or (value in outputs and value.shape is not None):
                continue  # a declared output keeps the names its author chose
            if value.shape is None or list(value.shape) != list(shape):
                value.shape = shape
                changed += 1
        return Outcome(changed, {"unknown": unknown} if unknown else {})
