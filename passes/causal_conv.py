"""Causal convolutions over carried positions: their past moves inside ``CausalConvWithState``."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from hal.ir import Graph, State
from hal.passes._edit import (
    Editor,
    Rule,
    apply_rules,
    attribute,
    dim,
    ints,
    is_op,
    producer,
    rank,
    remove_unused,
    same_dims,
)
from hal.passes.base import Outcome, Pass

_END = 2**31 - 1  # what exporters write for "to the end", at least


@dataclasses.dataclass(frozen=True)
class FuseCausalConv(Pass):
    """Let ``CausalConvWithState`` read its past, and carry only the positions that it reads.

    Preserves results: the last outputs of a convolution over past and present are those of one
    over the present that starts from the past. A state loses positions that nothing reads: k taps
    look back at k - 1.
    """

    name: ClassVar[str] = "causal_conv"

    def run(self, graph: Graph) -> Outcome:
        """Fuse, then narrow states; ``narrowed`` names those."""
        counts = apply_rules(graph, RULES)
        narrowed = [new.name for state in graph.state if (new := _narrow(graph, state)) is not None]
        remove_unused(graph)
        return Outcome(sum(counts.values()) + len(narrowed), {**counts, "narrowed": narrowed})


def _past_inside(edit: Editor, node: ir.Node) -> bool:
    """``Conv(Concat(past, x))[..., -len(x):]`` is ``Conv(x, past)``."""
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        return False
    padded, weight = node.inputs[0], node.inputs[1]
    concat, taps = producer(padded, "Concat"), dim(weight, -1)
    if concat is None or len(concat.inputs) != 2 or attribute(concat, "axis") not in (2, -1):
        return False
    past, x = concat.inputs
    result, state = node.outputs
    length = dim(past, 2)
    if past is None or taps is None or length is None or length < taps - 1 or state.uses():
        return False
    if result.is_graph_output() or state.is_graph_output():
        return False
    tails = [n for n, _ in result.uses()]
    if not tails or not all(_is_tail(n) and same_dims(n.outputs[0], x) for n in tails):
        return False
    if length > taps - 1:
        cut = [edit.constant([n]) for n in (length - taps + 1, _END, 2, 1)]
        whole, past = past, edit.op("Slice", [past, *cut])
        assert whole.shape is not None
        past.type, past.shape = whole.type, ir.Shape([*whole.shape[:2], taps - 1])
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    attributes = {k: a.value for k, a in node.attributes.items()}
    fused = edit.op("CausalConvWithState", [x, weight, bias, past], attributes, outputs=2, like=x)
    made = fused.producer()
    assert made is not None
    made.outputs[1].type, made.outputs[1].shape = past.type, past.shape
    for tail in tails:
        edit.replace(tail.outputs[0], fused)
    return True


def _is_tail(node: ir.Node) -> bool:
    """A slice along axis 2 up to the end. How much it keeps, its output's shape tells."""
    if not is_op(node, "Slice") or len(node.inputs) < 4:
        return False
    _, _, ends, axes, *steps = node.inputs
    end = ints(ends)
    return (
        end is not None
        and end[0] >= _END
        and ints(axes) in ([2], [-1])
        and all(ints(step) == [1] for step in steps if step is not None)
    )


def _narrow(graph: Graph, state: State) -> State | None:
    """Carry the convolution's own state, if all that is ever read of ``state`` is the same."""
    past = next(v for v in graph.graph.inputs if v.name == state.input)
    present = next(v for v in graph.graph.outputs if v.name == state.output)
    if state.growth_axis is not None or rank(past) != 3:
        return None
    reads = {n for n, _ in past.uses() if not _is_extent(n)}
    concats = {n for n in reads if is_op(n, "Concat") and n.inputs[0] is past}
    cuts = {n for n in reads if _is_tail(n)}
    if len(reads) != 2 or len(concats) != 1:
        return None
    (concat,) = concats
    seen = next(iter(cuts)).outputs[0] if cuts else past
    convs = [n for n, _ in seen.uses() if n is not concat and not _is_extent(n)]
    whole = producer(present, "Slice")
    if (
        len(convs) != 1
        or not is_op(convs[0], "CausalConvWithState")
        or convs[0].inputs[3] is not seen
        or list(concat.inputs[1:]) != [convs[0].inputs[0]]
        or whole is None
        or not _is_tail(whole)
        or whole.inputs[0] is not concat.outputs[0]
        or len(concat.outputs[0].uses()) != 1
        or present.uses()
        or not same_dims(past, present)
        or convs[0].outputs[1].is_graph_output()
    ):
        return None
    new = convs[0].outputs[1]
    past.shape = seen.shape
    if seen is not past:
        seen.replace_all_uses_with(past)
    name, graph.graph.outputs[graph.graph.outputs.index(present)] = present.name, new
    present.name, new.name = f"{name}/whole", name
    carried = dataclasses.replace(state, axes=("batch", "channel", "position"))
    graph.state = tuple(carried if s is state else s for s in graph.state)
    return carried


def _is_extent(node: ir.Node) -> bool:
    """Whether a node reads no more of the state than the extents of its first axes."""
    return is_op(node, "Shape") and 0 < attribute(node, "end", 0) <= 2


RULES: tuple[Rule, ...] = (Rule("past of a convolution", ("CausalConvWithState",), _past_inside),)
