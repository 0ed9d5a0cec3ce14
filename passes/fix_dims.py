"""Giving dynamic dims an extent, for chips whose programs have static shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import onnx_ir as ir

from hal.errors import InputError, did_you_mean
from hal.ir import Graph
from hal.passes._dims import parse, to_dim, to_expr
from hal.passes._edit import all_values
from hal.passes.base import Outcome, Pass, Pipeline


@dataclasses.dataclass(frozen=True)
class FixDims(Pass):
    """Replace dims by the extents that ``extents`` gives for their names.

    Preserves results for inputs of these extents; others no longer fit. Shape arithmetic stays for
    :class:`hal.passes.fold.Fold`.
    """

    name: ClassVar[str] = "fix dims"
    extents: Mapping[str, int]

    def run(self, graph: Graph) -> Outcome:
        """Rewrite the shapes of all values.

        Raises:
            InputError: a name is no dim of the inputs.
        """
        names = {
            str(dim): None
            for value in graph.graph.inputs
            for dim in value.shape or ()
            if isinstance(dim, ir.SymbolicDim)
        }
        for name in self.extents:
            if name not in names:
                raise InputError(
                    f"the model has no dynamic dim {name!r}",
                    did_you_mean(name, names) if names else "its shapes are static already",
                )
        fixed = {parse(name): extent for name, extent in self.extents.items()}
        changed = 0
        for value in [*graph.graph.inputs, *all_values(graph)]:
            if value.shape is None or value.shape.is_static():
                continue
            dims = [
                dim if isinstance(dim, int) or dim.value is None
                else to_dim(to_expr(dim).subs(fixed))
                for dim in value.shape
            ]  # fmt: skip
            if dims != list(value.shape):
                value.shape = ir.Shape(dims)
                changed += 1
        return Outcome(changed)


def fix_dims(graph: Graph, extents: Mapping[str, int] | None) -> Graph:
    """The graph with dims replaced by extents; itself without any.

    Raises:
        InputError: a name is no dim of the inputs, or an extent is not positive.
    """
    if not extents:
        return graph
    for name, extent in extents.items():
        if extent < 1:
            raise InputError(f"dim {name!r} cannot have the extent {extent}", "give 1 or more")
    return Pipeline("dims", (FixDims(dict(extents)),)).run(graph)[0]
