"""Computing values again from other leaves: for new tokens only, for old ones, or elsewhere.

Steps between two values of a per-token program hold for any number of tokens, so they can be
copied. Only targets of ``Reshape`` and ``Expand`` speak of the number; the copies leave it open.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from hal.passes._edit import Editor, is_op
from hal.passes._tokens import TokenPaths, is_weight


class Sink(Protocol):
    """Where copies go."""

    def copy(self, node: ir.Node, inputs: list[ir.Value | None]) -> list[ir.Value]:
        """Add the node with other inputs; return its outputs."""

    def constant(self, numbers: list[int]) -> ir.Value:
        """Add a vector of int64."""

    def weight(self, value: ir.Value) -> ir.Value:
        """The weight as the copies shall read it."""


def copied_attributes(node: ir.Node) -> dict[str, Any]:
    """A node's attributes; a copied ``Reshape`` always reads 0 as "keep"."""
    return {name: a.value for name, a in node.attributes.items() if name != "allowzero"}


class InPlace:
    """Copies go before an attention node of the same graph."""

    def __init__(self, edit: Editor) -> None:
        self._edit = edit

    def copy(self, node: ir.Node, inputs: list[ir.Value | None]) -> list[ir.Value]:
        """See :class:`Sink`."""
        attributes = copied_attributes(node)
        count = len(node.outputs)
        first = self._edit.op(node.op_type, inputs, attributes, outputs=count, domain=node.domain)
        made = first.producer()
        assert made is not None
        for old, new in zip(node.outputs, made.outputs, strict=True):
            new.type = old.type
        return list(made.outputs)

    def constant(self, numbers: list[int]) -> ir.Value:
        """See :class:`Sink`."""
        return self._edit.constant(numbers, "shape", np.int64)

    def weight(self, value: ir.Value) -> ir.Value:
        """See :class:`Sink`."""
        return value


class Retimed:
    """Values of a per-token program computed from ``leaves`` (canonical value to stand-in)."""

    def __init__(
        self, paths: TokenPaths, leaves: Mapping[ir.Value, ir.Value], sink: Sink, *, fresh: bool
    ) -> None:
        """``fresh`` copies every step; otherwise a step with unchanged inputs stands for itself."""
        self._paths, self._leaves, self._sink, self._fresh = paths, leaves, sink, fresh
        self._copies: dict[ir.Node, list[ir.Value]] = {}

    def __call__(self, value: ir.Value) -> ir.Value:
        """``value`` from the leaves; it must be a step's result, a root only unless ``fresh``."""
        value = self._paths.canonical(value)
        if value in self._leaves:
            return self._leaves[value]
        step = self._paths.steps[value]
        if step is None:
            assert not self._fresh
            return value
        node = step.node
        if node not in self._copies:
            self._copies[node] = self._copy(node, value)
        return self._copies[node][node.outputs.index(value)]

    def _copy(self, node: ir.Node, value: ir.Value) -> list[ir.Value]:
        inputs = [
            v if v is None else self._sink.weight(v) if is_weight(v) else self(v)
            for v in self._data(node)
        ]
        changed = any(a is not b for a, b in zip(inputs, node.inputs, strict=False))
        if not self._fresh and not changed:
            return list(node.outputs)
        if is_op(node, "Reshape"):
            inputs[1:] = [self._sink.constant(self._paths.extents(value))]
        elif is_op(node, "Expand"):
            target = [1 if n < 1 else n for n in self._paths.extents(value)]
            inputs[1:] = [self._sink.constant(target)]
        return self._sink.copy(node, inputs)

    def _data(self, node: ir.Node) -> list[ir.Value | None]:
        """Inputs of a node; targets of Reshape and Expand are made anew."""
        if is_op(node, "Reshape", "Expand"):
            return list(node.inputs[:1])
        return list(node.inputs)
