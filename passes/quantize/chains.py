"""Which tensors get codes of 8 bits so that integer kernels follow one another.

Between two quantized layers there are activation functions, residual sums, concatenations and
pools. If those were left in floats, each would need its operands decoded and its result coded
again. So their operands and results are coded too, where what they compute goes into a quantized
layer in the end; what leads elsewhere (box arithmetic, say) stays in floats.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import onnx_ir as ir

from hal.ir import Graph
from hal.passes._edit import array, attribute, is_constant, is_op, single_use
from hal.passes.quantize.layers import CONVOLUTIONS, Layer

MOVES = (
    "DepthToSpace", "Flatten", "Identity", "MaxPool", "Reshape", "Resize", "Slice", "SpaceToDepth",
    "Split", "Squeeze", "Transpose", "Unsqueeze",
)  # fmt: skip
"""Ops that hand elements on as they are: what goes in and what comes out share their codes.

``Resize`` only does so to the nearest neighbour.
"""

COMPUTES = (
    "Add", "AveragePool", "Concat", "GlobalAveragePool", "LeakyRelu", "Mul", "Relu", "Sigmoid",
)  # fmt: skip
"""Ops that integer kernels compute from codes to codes."""

_ALL_OPERANDS = ("Add", "Concat", "Mul")
_LIMITS = ("Relu", "Clip")


@dataclasses.dataclass(frozen=True)
class Chains:
    """What is coded in a graph.

    Attributes:
        heavy: the products and convolutions whose operands are coded, each with its layer.
        between: other ops that are computed from codes to codes.
        floats: ops that stay in floats though quantized layers come before and after them.
        coded: every tensor with codes, in the order of the graph, with the first tensor of those
            that it shares its codes with (itself, mostly).
        whole: tensors that only exist as codes; of the others codes are made for some readers.
    """

    heavy: dict[ir.Node, Layer]
    between: tuple[ir.Node, ...]
    floats: tuple[ir.Node, ...]
    coded: dict[ir.Value, ir.Value]
    whole: frozenset[ir.Value]

    @property
    def readers(self) -> frozenset[ir.Node]:
        """Nodes that read codes."""
        return frozenset(self.heavy) | frozenset(self.between)


def find_chains(graph: Graph, layers: Sequence[Layer]) -> Chains:
    """What to code so that ``layers`` are computed in integers."""
    heavy = {node: layer for layer in layers for node in heavy_nodes(layer)}
    forward = _forward(graph, heavy)
    between = _leading(graph, heavy, forward)
    coded: dict[ir.Value, None] = {}
    whole: set[ir.Value] = set()
    for node in graph.graph:
        if node not in heavy and node not in between:
            continue
        coded.update(dict.fromkeys(operands(node)))
        if node in between or is_op(node, *CONVOLUTIONS):
            results = [tail(value) for value in node.outputs if value.name]
            coded.update(dict.fromkeys(results))
            whole.update(results)
    order = {value: i for i, value in enumerate(_values(graph))}
    ordered = sorted(coded, key=lambda value: order[value])
    return Chains(
        heavy,
        tuple(node for node in graph.graph if node in between),
        tuple(_left(graph, heavy, between)),
        _shared(ordered, between),
        frozenset(whole),
    )


def heavy_nodes(layer: Layer) -> tuple[ir.Node, ...]:
    """The nodes that multiply with a layer's weight."""
    return layer.uses if layer.kind == "conv" else layer.products


def operands(node: ir.Node) -> list[ir.Value]:
    """The tensors that a node computes with: not its weights, shapes or limits."""
    inputs = node.inputs if is_op(node, *_ALL_OPERANDS) else node.inputs[:1]
    return [value for value in inputs if value is not None]


def tail(value: ir.Value) -> ir.Value:
    """A node's result, after the limits that its codes imply anyway if nothing else reads it."""
    producer = value.producer()
    if producer is None or not is_op(producer, *CONVOLUTIONS, "Add", "Mul", "Concat"):
        return value
    if not single_use(value):
        return value
    reader = next(iter(value.uses())).node
    if is_op(reader, "Relu") or (is_op(reader, "Clip") and _starts_at_zero(reader)):
        return reader.outputs[0] if reader.graph is producer.graph else value
    return value


def _starts_at_zero(node: ir.Node) -> bool:
    limits = [*node.inputs[1:], None, None][:2]
    low, high = array(limits[0]), array(limits[1])
    return low is not None and float(low) == 0 and (limits[1] is None or high is not None)


def _values(graph: Graph) -> Iterator[ir.Value]:
    yield from graph.graph.inputs
    for node in graph.graph:
        yield from node.outputs


def _forward(graph: Graph, heavy: dict[ir.Node, Layer]) -> set[ir.Node]:
    """Ops that could take codes from a quantized convolution, directly or through each other."""
    reached = {value for node in heavy for value in operands(node)}
    found: set[ir.Node] = set()
    for node in graph.graph:
        if node in heavy:
            if is_op(node, *CONVOLUTIONS):
                reached.add(tail(node.outputs[0]))
        elif _can_code(node) and any(value in reached for value in operands(node)):
            found.add(node)
            reached.update(tail(value) for value in node.outputs)
    return found


def _can_code(node: ir.Node) -> bool:
    if not is_op(node, *MOVES, *COMPUTES):
        return False
    if is_op(node, "Resize") and attribute(node, "mode", "nearest") != "nearest":
        return False
    if is_op(node, "MaxPool") and len(node.outputs) > 1 and node.outputs[1].uses():
        return False
    if is_op(node, "Relu") and tail(node.inputs[0]) is node.outputs[0]:  # type: ignore[arg-type]
        return False
    values = operands(node)
    return bool(values) and all(
        not is_constant(value) and value.dtype is ir.DataType.FLOAT for value in values
    )


def _leading(graph: Graph, heavy: dict[ir.Node, Layer], forward: set[ir.Node]) -> set[ir.Node]:
    """Those of ``forward`` whose result goes into a quantized layer; also global pools."""
    found: set[ir.Node] = set()
    for node in reversed(list(graph.graph)):
        if node not in forward:
            continue
        readers = {use.node for value in node.outputs for use in tail(value).uses()}
        leads = any(
            reader in found or (reader in heavy and tail_reads(reader, node)) for reader in readers
        )
        if leads or (is_op(node, "GlobalAveragePool") and _from_codes(node, heavy, forward)):
            found.add(node)
    return found


def tail_reads(reader: ir.Node, node: ir.Node) -> bool:
    """Whether what ``node`` makes is an operand of ``reader``."""
    made = [tail(value) for value in node.outputs]
    return any(value in made for value in operands(reader))


def _from_codes(node: ir.Node, heavy: dict[ir.Node, Layer], forward: set[ir.Node]) -> bool:
    """Whether a pool's operand has codes whether the pool reads them or not."""
    value = node.inputs[0]
    maker = value.producer() if value is not None else None
    if maker is not None and _is_tail(maker) and maker.inputs[0] is not None:
        maker = maker.inputs[0].producer()
    return maker is not None and (maker in forward or maker in heavy)


def _shared(ordered: Sequence[ir.Value], between: set[ir.Node]) -> dict[ir.Value, ir.Value]:
    """Each tensor with the first of those that share its codes."""
    first: dict[ir.Value, ir.Value] = {}
    for value in ordered:
        maker = value.producer()
        source = maker.inputs[0] if maker in between and is_op(maker, *MOVES) else None
        first[value] = first.get(source, value) if source is not None else value
    return first


def _left(graph: Graph, heavy: dict[ir.Node, Layer], between: set[ir.Node]) -> Iterator[ir.Node]:
    """Ops in floats that come after one integer op and before another, limits aside."""
    after: set[ir.Value] = set()
    candidates: list[ir.Node] = []
    for node in graph.graph:
        if node in heavy or node in between:
            after.update(tail(value) for value in node.outputs)
        elif any(value in after for value in node.inputs if value is not None):
            if not _is_tail(node):
                candidates.append(node)
            after.update(node.outputs)
    before: set[ir.Node] = set()
    for node in reversed(list(graph.graph)):
        readers = {use.node for value in node.outputs for use in value.uses()}
        if readers & before or any(r in heavy or r in between for r in readers):
            before.add(node)
    yield from (node for node in candidates if node in before)


def _is_tail(node: ir.Node) -> bool:
    source = node.inputs[0] if node.inputs else None
    return source is not None and is_op(node, *_LIMITS) and tail(source) is node.outputs[0]


__all__ = ["COMPUTES", "MOVES", "Chains", "find_chains", "heavy_nodes", "operands", "tail"]
