"""Rules as data, and the few edits that rules are made of.

A :class:`Rule` is a value: the op types it looks at and a function that tries one rewrite at one
node. Lists of rules are applied by :func:`apply_rules`::

    RULES = (Rule("x * sigmoid(x)", ("Mul",), _swish),)

    def _swish(edit: Editor, node: ir.Node) -> bool:
        for gate, other in operand_orders(node):
            sigmoid = producer(gate, "Sigmoid")
            if sigmoid is not None and sigmoid.inputs[0] is other:
                return edit.replace(node.outputs[0], edit.op("Swish", [other]))
        return False

Rules are plain functions and not drawn patterns because what they match differs in ways that a
drawn pattern has to enumerate: operands swapped, scalars of shape [] or [1], casts in between,
``1/sqrt`` written in four ways. They also never read a weight's bytes to find out that it is not
the scalar they look for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from hal.ir import Graph

SMALL = 4096
"""Constants with more elements than this are weights: rules never read them."""


SCOPE_KEY = "hal.scope"
"""Metadata that says which module of the source a node came from; a new node inherits it."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """One rewrite: tried at every node whose op type is in ``roots``; True when it changed it."""

    name: str
    roots: tuple[str, ...]
    rewrite: Callable[[Editor, ir.Node], bool]


class Editor:
    """Makes nodes and constants next to the node that is being rewritten."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._names = {v.name for v in all_values(graph)}
        self._anchor: ir.Node | None = None

    def at(self, node: ir.Node) -> None:
        """New nodes go directly before ``node``."""
        self._anchor = node

    def fresh(self, base: str) -> str:
        """A value name that is not in use, made from ``base``."""
        name, count = base, 0
        while name in self._names:
            count += 1
            name = f"{base}_{count}"
        self._names.add(name)
        return name

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        like: ir.Value | None = None,
        outputs: int = 1,
        before: ir.Node | None = None,
        domain: str = "",
    ) -> ir.Value:
        """Insert a node before the anchor and return its first output.

        ``like`` gives the output its shape and dtype.
        """
        anchor = before or self._anchor
        assert anchor is not None
        assert anchor.graph is not None
        node = ir.node(op_type, inputs, dict(attributes or {}), domain=domain, num_outputs=outputs)
        for value in node.outputs:
            value.name = self.fresh(f"{op_type.lower()}_out")
        node.name = node.outputs[0].name
        if like is not None:
            copy_type(like, node.outputs[0])
        if SCOPE_KEY in anchor.metadata_props:
            node.metadata_props[SCOPE_KEY] = anchor.metadata_props[SCOPE_KEY]
        anchor.graph.insert_before(anchor, node)
        return node.outputs[0]

    def constant(self, array: Any, base: str = "constant", dtype: Any = None) -> ir.Value:
        """Register a small constant as an initializer of the main graph."""
        return self.tensor(ir.tensor(np.asarray(array, dtype=dtype)), base)

    def tensor(self, tensor: ir.TensorProtocol, base: str) -> ir.Value:
        """Register a tensor (lazy or not) as an initializer of the main graph."""
        name = self.fresh(base)
        value = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(static_shape(tensor)),
            const_value=tensor,
        )
        self.graph.graph.register_initializer(value)
        return value

    def replace(self, old: ir.Value, new: ir.Value) -> bool:
        """Make every use of ``old`` a use of ``new``; a graph output keeps its name.

        Returns True, so that a rule can end with it.
        """
        if new.shape is None and old.shape is not None:
            new.shape = old.shape
        if new.type is None and old.type is not None:
            new.type = old.type
        if not old.is_graph_output():
            old.replace_all_uses_with(new)
            return True
        owner = old.graph
        producer_node = new.producer()
        if (
            new.is_graph_output()
            or producer_node is None
            or producer_node.graph is not owner
            or new.is_graph_input()
        ):
            before = old.producer()
            new = self.op("Identity", [new], like=old, before=before)
        name, old_name = old.name, self.fresh(f"{old.name}_replaced")
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name, new.name = old_name, name
        return True


def apply_rules(graph: Graph, rules: Iterable[Rule], *, rounds: int = 1) -> dict[str, int]:
    """Apply rules at every node in order, main graph and subgraphs; return changes by rule name.

    What a rewrite leaves unused is removed. ``rounds`` repeats the sweep while it changes things.
    """
    by_root: dict[str, list[Rule]] = {}
    for rule in rules:
        for root in rule.roots:
            by_root.setdefault(root, []).append(rule)
    counts: dict[str, int] = {}
    for _ in range(rounds):
        changed = _sweep(graph, by_root)
        for name, count in changed.items():
            counts[name] = counts.get(name, 0) + count
        if not changed:
            break
        remove_unused(graph)
    return counts


def _sweep(graph: Graph, by_root: Mapping[str, list[Rule]]) -> dict[str, int]:
    edit, changed = Editor(graph), dict[str, int]()
    for node in list(graph.nodes()):
        if node.domain not in ("", "ai.onnx") or node.op_type not in by_root or not _used(node):
            continue
        edit.at(node)
        for rule in by_root[node.op_type]:
            if rule.rewrite(edit, node):
                changed[rule.name] = changed.get(rule.name, 0) + 1
                break
    return changed


def _used(node: ir.Node) -> bool:
    return node.graph is not None and any(o.is_graph_output() or o.uses() for o in node.outputs)


def remove_unused(graph: Graph) -> int:
    """Remove nodes and initializers that nothing uses; return the nodes removed."""
    before = graph.node_count()
    common.RemoveUnusedNodesPass()(graph.model)
    return before - graph.node_count()


def all_values(graph: Graph) -> Iterator[ir.Value]:
    """Every value of the main graph and its subgraphs."""

    def of(body: ir.Graph) -> Iterator[ir.Value]:
        yield from body.inputs
        yield from body.initializers.values()

    yield from of(graph.graph)
    for node in graph.nodes():
        yield from node.outputs
        for attribute in node.attributes.values():
            if attribute.is_ref():
                continue
            if attribute.type == ir.AttributeType.GRAPH:
                yield from of(attribute.as_graph())
            elif attribute.type == ir.AttributeType.GRAPHS:
                for body in attribute.as_graphs():
                    yield from of(body)


def static_shape(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """A tensor's shape as numbers."""
    return tuple(tensor.shape.numpy())


def copy_type(source: ir.Value, target: ir.Value) -> None:
    """Give ``target`` the shape and dtype of ``source``."""
    target.shape, target.type = source.shape, source.type


def is_op(node: ir.Node | None, *op_types: str) -> bool:
    """True when ``node`` is an op of the default domain with one of these types."""
    return node is not None and node.domain in ("", "ai.onnx") and node.op_type in op_types


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that makes ``value`` if it is one of these default-domain ops."""
    node = value.producer() if value is not None else None
    return node if is_op(node, *op_types) else None


def operand_orders(node: ir.Node) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Both orders of a binary node's operands (one order when they are the same value)."""
    first, second = node.inputs[0], node.inputs[1]
    if first is None or second is None:
        return
    yield first, second
    if first is not second:
        yield second, first


def is_constant(value: ir.Value | None) -> bool:
    """True for an initializer that a caller cannot override."""
    return (
        value is not None
        and value.is_initializer()
        and not value.is_graph_input()
        and value.const_value is not None
    )


def array(value: ir.Value | None) -> np.ndarray | None:
    """The elements of a small constant; None for anything else, weights included."""
    if value is None or not is_constant(value):
        return None
    tensor = value.const_value
    return tensor.numpy() if tensor is not None and tensor.size <= SMALL else None


def scalar(value: ir.Value | None) -> float | None:
    """The element of a constant with exactly one element, whatever its rank."""
    if value is None or not is_constant(value) or value.const_value is None:
        return None
    return float(value.const_value.numpy().item()) if value.const_value.size == 1 else None


def is_scalar(value: ir.Value | None, expected: float, tolerance: float = 1e-6) -> bool:
    """True when ``value`` is a one-element constant equal to ``expected``."""
    found = scalar(value)
    return found is not None and math.isclose(found, expected, rel_tol=tolerance)


def ints(value: ir.Value | None) -> list[int] | None:
    """A small integer constant as a flat list."""
    found = array(value)
    if found is None or found.dtype.kind not in "iu":
        return None
    return [int(x) for x in found.reshape(-1)]


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """An attribute's value, or ``default``."""
    found = node.attributes.get(name)
    return default if found is None or found.is_ref() else found.value


def rank(value: ir.Value | None) -> int | None:
    """Number of axes if known."""
    return None if value is None or value.shape is None else len(value.shape)


def dim(value: ir.Value | None, axis: int) -> int | None:
    """A static extent, or None."""
    if value is None or value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return None
    found = value.shape[axis]
    return found if isinstance(found, int) else None


def single_use(value: ir.Value) -> bool:
    """True when exactly one node input, and no graph output, is this value."""
    return not value.is_graph_output() and len(value.uses()) == 1


def skip(value: ir.Value | None, *op_types: str) -> ir.Value | None:
    """Walk up through unary ops of these types (``Cast``, ``Identity``, …)."""
    while (node := producer(value, *op_types)) is not None:
        value = node.inputs[0]
    return value


def same_extents(first: Iterable[Any], second: Iterable[Any]) -> bool:
    """True when two runs of dims are equal and known; an unknown dim equals nothing."""
    one, two = list(first), list(second)
    known = all(isinstance(d, int) or d.value is not None for d in one)
    return known and one == two


def same_dims(first: ir.Value | None, second: ir.Value | None) -> bool:
    """True when both shapes are fully known (numbers or names) and equal."""
    if first is None or second is None or first.shape is None or second.shape is None:
        return False
    return same_extents(first.shape, second.shape)
