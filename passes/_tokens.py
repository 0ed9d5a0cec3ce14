"""What is computed token by token between the hidden state and an attention's keys and values.

:func:`token_paths` walks up from both operands of one ``Attention`` node. On the way, appending new
tokens to a carried state counts as doing nothing, so the result is one program per token, wherever
the exported model had its cache. The walk ends at *roots*: values that cannot be computed from
other values of the same token (the residual stream), or must not be computed again for old tokens
because they need the token's own position (rotary embedding).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import onnx_ir as ir
import sympy

from hal.ir import Graph, State
from hal.passes._dims import Shapes
from hal.passes._edit import Editor, attribute, dim, ints, is_constant, is_op, rank
from hal.passes.attention import _before_repeat


class NotTokenWiseError(Exception):
    """Why an attention's keys and values cannot be cut elsewhere, in a sentence."""


@dataclasses.dataclass(frozen=True)
class Append:
    """New tokens put after a state's old ones: by ``Concat``, or by the attention op itself."""

    state: State
    past: ir.Value
    new: ir.Value
    present: ir.Value


@dataclasses.dataclass(frozen=True)
class Step:
    """One op on the way: what it reads of the same token, and its price per token."""

    node: ir.Node
    inputs: tuple[ir.Value, ...]
    linear: bool
    """Linear in its inputs up to a constant, which may be added."""
    flops: int
    moves: bool
    """Whether the result is written to memory; a mere change of shape is not."""


@dataclasses.dataclass
class TokenPaths:
    """The per-token program behind one ``Attention``; see the module's text.

    ``steps`` maps every value on the way to how it is computed, None for roots, inputs before
    outputs. ``key`` and ``value`` are the operands with heads not repeated.
    """

    node: ir.Node
    shapes: Shapes
    key: ir.Value
    value: ir.Value
    lengths: tuple[Any, ...]
    """Extents that count tokens: of the query, and of past and query together."""
    batch: Any
    steps: dict[ir.Value, Step | None] = dataclasses.field(default_factory=dict)
    appends: dict[ir.Value, Append] = dataclasses.field(default_factory=dict)
    """By the value that holds past and new tokens (the new ones only, if the op appends)."""

    @property
    def query(self) -> ir.Value:
        """The queries, ``[batch, heads, sequence, channels]``."""
        found = self.node.inputs[0]
        assert found is not None
        return found

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return int(self.shapes.shape[self.query][1])

    def canonical(self, value: ir.Value) -> ir.Value:
        """The value for new tokens only, where ``value`` is one with a state's tokens before it."""
        while value in self.appends and self.appends[value].new is not value:
            value = self.appends[value].new
        return value

    def position(self, value: ir.Value) -> int:
        """The axis that counts tokens.

        Raises:
            NotTokenWiseError: no axis does, or the batch is not the first axis.
        """
        extents = self.shapes.shape.get(value, ())
        found = [i for i, e in enumerate(extents) if e in self.lengths]
        if len(found) != 1 or found[0] == 0 or extents[0] != self.batch:
            raise NotTokenWiseError(f"{value.name!r} has no axis for batch and one for the tokens")
        return found[0]

    def per_token(self, value: ir.Value) -> int:
        """Elements for one token of one sequence."""
        where = self.position(value)
        rest = [e for i, e in enumerate(self.shapes.shape[value]) if i not in (0, where)]
        if not all(e.is_Integer for e in rest):
            raise NotTokenWiseError(f"{value.name!r} has a free axis besides batch and tokens")
        return math.prod(int(e) for e in rest)

    def bytes(self, value: ir.Value) -> int:
        """Bytes for one token of one sequence."""
        assert value.dtype is not None
        return math.ceil(self.per_token(value) * value.dtype.bitwidth / 8)

    def extents(self, value: ir.Value) -> list[int]:
        """Static extents of a value; 0 for the batch, -1 for the tokens."""
        where = self.position(value)
        shape = self.shapes.shape[value]
        return [0 if i == 0 else -1 if i == where else int(e) for i, e in enumerate(shape)]

    def reaching(self, target: ir.Value) -> set[ir.Value]:
        """Values that ``target`` is computed from, itself included."""
        found, todo = set[ir.Value](), [target]
        while todo:
            value = todo.pop()
            step = self.steps[value]
            if value not in found:
                found.add(value)
                todo += step.inputs if step is not None else ()
        return found


def token_paths(graph: Graph, edit: Editor, node: ir.Node, shapes: Shapes) -> TokenPaths:
    """Analyse one ``Attention`` node; values that it adds to the graph are for the caller to use.

    Raises:
        NotTokenWiseError: keys or values are not carried state and new tokens, or use neither.
    """
    if node.graph is not graph.graph:
        raise NotTokenWiseError("the op is in the body of another")
    q, k, v = node.inputs[:3]
    if q is None or k is None or v is None or any(rank(x) != 4 for x in (q, k, v)):
        raise NotTokenWiseError("queries, keys and values have no axis for heads")
    if len(node.inputs) > 6 or len(node.outputs) > 3 or any(x not in shapes.shape for x in (q, k)):
        raise NotTokenWiseError("the op has inputs or outputs that are not looked at")
    q_shape, k_shape = shapes.shape[q], shapes.shape[k]
    if q_shape[2].is_Integer or q_shape[2].atoms(sympy.Dummy) or not q_shape[1].is_Integer:
        raise NotTokenWiseError("the number of new tokens is not a free dim")
    paths = TokenPaths(node, shapes, k, v, (q_shape[2], k_shape[2]), q_shape[0])
    states: dict[str | None, State] = {s.input: s for s in graph.state if s.growth_axis is not None}
    _own_appends(paths, states)
    _unrepeat(paths, edit)
    for operand in (paths.key, paths.value):
        _walk(paths, operand, states)
    paths.key, paths.value = paths.canonical(paths.key), paths.canonical(paths.value)
    if not paths.appends:
        raise NotTokenWiseError("no state is carried")
    for value, step in paths.steps.items():
        if step is None and shapes.shape[value][paths.position(value)] != q_shape[2]:
            raise NotTokenWiseError(f"{value.name!r} covers old tokens and is not carried")
    _check_uses(graph, paths)
    return paths


def _own_appends(paths: TokenPaths, states: Mapping[str | None, State]) -> None:
    """Where the op itself puts new keys and values after the past ones."""
    node = paths.node
    for new, past, present in ((1, 4, 1), (2, 5, 2)):
        before = node.inputs[past] if len(node.inputs) > past else None
        if before is None:
            continue
        made, state = node.inputs[new], states.get(before.name)
        if state is None or made is None or len(node.outputs) <= present:
            raise NotTokenWiseError("past keys and values are not carried state")
        paths.appends[made] = Append(state, before, made, node.outputs[present])


def _unrepeat(paths: TokenPaths, edit: Editor) -> None:
    """Take keys and values before their heads are repeated: the op repeats them itself."""
    if paths.key is paths.value or paths.node.inputs[1] not in paths.appends:
        return
    edit.at(paths.node)
    k, v = _before_repeat(edit, paths.key), _before_repeat(edit, paths.value)
    if k is None or v is None or dim(k, 1) != dim(v, 1) or dim(k, 1) is None:
        return
    for operand, found in ((paths.key, k), (paths.value, v)):
        if found not in paths.shapes.shape:  # made just now, by a squeeze
            batch, _, *rest = paths.shapes.shape[operand]
            paths.shapes.shape[found] = (batch, sympy.Integer(dim(found, 1) or 1), *rest)
    paths.key, paths.value = k, v


def _walk(paths: TokenPaths, value: ir.Value, states: Mapping[str | None, State]) -> None:
    value = paths.canonical(value)
    if value in paths.steps:
        return
    append = _append(paths, value, states)
    if append is not None:
        paths.appends[value] = append
        _walk(paths, append.new, states)
        return
    paths.per_token(value)
    step = _step(paths, value)
    if step is not None:
        sources = []
        for source in step.inputs:
            _walk(paths, source, states)
            sources.append(paths.canonical(source))
        step = dataclasses.replace(step, inputs=tuple(sources))
    paths.steps[value] = step


def _append(
    paths: TokenPaths, value: ir.Value, states: Mapping[str | None, State]
) -> Append | None:
    """``Concat(past, new)`` along the axis that counts tokens, the past being carried state."""
    node = value.producer()
    if not is_op(node, "Concat") or node is None or len(node.inputs) != 2:
        return None
    past, new = node.inputs
    if past is None or new is None or past.name not in states or not past.is_graph_input():
        return None
    axis = attribute(node, "axis", 0) % (rank(value) or 1)
    return Append(states[past.name], past, new, value) if axis == paths.position(value) else None


def _check_uses(graph: Graph, paths: TokenPaths) -> None:
    """Nobody but this attention may need the states that would go, or what is made of them."""
    mine = {paths.node} | {s.node for s in paths.steps.values() if s is not None}
    outputs = {s.output for s in graph.state}
    for append in paths.appends.values():
        appender = append.present.producer()
        for use in append.past.uses():
            if use.node is not appender and not is_op(use.node, "Shape"):
                raise NotTokenWiseError(f"{append.past.name!r} has other readers")
        if append.present.name not in outputs or _escapes(append.present, mine):
            raise NotTokenWiseError(f"{append.present.name!r} has other readers")
    query, total = paths.lengths
    for value in paths.steps:
        old = query != total and paths.shapes.shape[value][paths.position(value)] == total
        if old and (value.is_graph_output() or _escapes(value, mine)):
            raise NotTokenWiseError(f"{value.name!r} has other readers")


def _escapes(value: ir.Value, nodes: set[ir.Node]) -> bool:
    return any(use.node not in nodes for use in value.uses())


# --- ops that work token by token --------------------------------------------------------------

_Rule = Callable[[TokenPaths, ir.Node, ir.Value], Step | None]


def _step(paths: TokenPaths, value: ir.Value) -> Step | None:
    """How a value comes from others of the same token; None if it is a root."""
    node = value.producer()
    rule = _RULES.get(node.op_type) if node is not None and node.domain == "" else None
    if node is None or rule is None:
        return None
    try:
        step = rule(paths, node, value)
        for source in step.inputs if step is not None else ():
            paths.per_token(source)
    except NotTokenWiseError:
        return None
    return step


def is_weight(value: ir.Value | None) -> bool:
    """True for a constant, and for what is computed from constants only."""
    if value is None:
        return True
    if is_constant(value):
        return True
    node = value.producer()
    return node is not None and bool(node.inputs) and all(is_weight(v) for v in node.inputs)


def data_inputs(node: ir.Node) -> Iterator[ir.Value]:
    """Inputs that are no weights."""
    return (v for v in node.inputs if v is not None and not is_weight(v))


def _one(node: ir.Node) -> ir.Value | None:
    """The first input, if all others are weights."""
    found = list(data_inputs(node))
    return found[0] if len(found) == 1 and found[0] is node.inputs[0] else None


def _element_wise(paths: TokenPaths, node: ir.Node, value: ir.Value) -> Step | None:
    found = list(data_inputs(node))
    if len(found) != 1 or rank(found[0]) != rank(value):
        return None
    linear = node.op_type in ("Identity", "Mul", "Add", "Sub", "Neg", "Cast")
    linear = linear or (node.op_type == "Div" and found[0] is node.inputs[0])
    if node.op_type == "Cast" and (
        found[0].dtype is None or not found[0].dtype.is_floating_point()
    ):
        return None
    return Step(node, (found[0],), linear, paths.per_token(value), node.op_type != "Identity")


def _matmul(paths: TokenPaths, node: ir.Node, value: ir.Value) -> Step | None:
    found = list(data_inputs(node))
    if len(found) != 1 or found[0].shape is None:
        return None
    size, contracted = len(found[0].shape), -1 if found[0] is node.inputs[0] else -2
    if paths.position(found[0]) == size + contracted:
        return None
    inner = dim(found[0], contracted)
    if inner is None:
        return None
    return Step(node, (found[0],), True, 2 * inner * paths.per_token(value), True)


def _norm(paths: TokenPaths, node: ir.Node, value: ir.Value) -> Step | None:
    source = _one(node)
    if source is None or value is not node.outputs[0]:
        return None
    axis = attribute(node, "axis", -1) % (rank(source) or 1)
    if paths.position(source) >= axis:
        return None
    return Step(node, (source,), False, 6 * paths.per_token(value), True)


def _reshape(paths: TokenPaths, node: ir.Node, value: ir.Value) -> Step | None:
    """Only where what is before the tokens stays before them."""
    source = node.inputs[0]
    if source is None:
        return None
    before, after = paths.extents(source), paths.extents(value)
    head, tail = before[1 : paths.position(source)], after[1 : paths.position(value)]
    if math.prod(head) != math.prod(tail):
        return None
    return Step(node, (source,), True, 0, False)


def _rearranged(paths: TokenPaths, node: ir.Node, value: ir.Value) -> Step | None:
    """Transpose, Squeeze, Unsqueeze: the axes are found again by their extents."""
    source = node.inputs[0]
    if source is None or paths.position(value) < 1:
        return None
    order = attribute(node, "perm")
    if order is not None and order[0] != 0:
        return None
    return Step(node, (source,), True, 0, node.op_type == "Transpose")


def _on_another_axis(paths: TokenPaths, node: ir.Node, value: ir.Value) -> Step | None:
    """Split, Gather and Concat along an axis that counts neither batch nor tokens."""
    found = list(data_inputs(node))
    if not found or (node.op_type != "Concat" and _one(node) is None):
        return None
    if len(found) != len(node.inputs) and node.op_type == "Concat":
        return None
    axis = attribute(node, "axis", 0) % (rank(found[0]) or 1)
    where = {paths.position(v) for v in found}
    if axis in where or axis == 0 or len(where) != 1:
        return None
    return Step(node, tuple(found), True, 0, True)


def _slice(paths: TokenPaths, node: ir.Node, value: ir.Value) -> Step | None:
    source = _one(node)
    axes = ints(node.inputs[3]) if len(node.inputs) > 3 else None
    if source is None or axes is None:
        return None
    size = rank(source) or 1
    if {a % size for a in axes} & {0, paths.position(source)}:
        return None
    return Step(node, (source,), True, 0, True)


def _expand(paths: TokenPaths, node: ir.Node, value: ir.Value) -> Step | None:
    source = node.inputs[0]
    if source is None or rank(source) != rank(value):
        return None
    if paths.position(source) != paths.position(value):
        return None
    return Step(node, (source,), True, 0, True)


_ELEMENT_WISE = (
    "Identity", "Cast", "Neg", "Mul", "Div", "Add", "Sub", "Sigmoid", "Tanh", "Relu", "Gelu",
    "Swish",
)  # fmt: skip

_RULES: dict[str, _Rule] = {
    **dict.fromkeys(_ELEMENT_WISE, _element_wise),
    "MatMul": _matmul,
    "RMSNormalization": _norm,
    "LayerNormalization": _norm,
    "Reshape": _reshape,
    "Transpose": _rearranged,
    "Squeeze": _rearranged,
    "Unsqueeze": _rearranged,
    "Split": _on_another_axis,
    "Gather": _on_another_axis,
    "Concat": _on_another_axis,
    "Slice": _slice,
    "Expand": _expand,
}
