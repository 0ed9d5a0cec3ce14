"""Finding residual streams: values that linear layers write to and, behind a norm, read.

A *stream* is a set of values connected by sums and by what leaves channels alone (casts, reshapes,
picked positions, scalars, one factor for each token). What makes its values must be linear: a
product with a weight, a look-up, experts. What reads them must be a norm whose result only linear
layers read, or a linear layer. Then a change of basis of the stream goes into these weights.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from hal.ir import HAL_DOMAIN, Graph
from hal.passes._edit import array, attribute, dim, ints, is_constant, is_op, rank

_MOVES = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Expand", "Slice", "Gather",
          "GatherND", "GatherElements", "Transpose", "Concat", "Split")  # fmt: skip
_NORMS = ("RMSNormalization", "LayerNormalization")


class NotLinear(Exception):  # noqa: N818 - it is no error, it ends a search
    """Why a value is no residual stream."""


@dataclasses.dataclass(frozen=True)
class Use:
    """A weight that makes the stream's values or reads them.

    Attributes:
        node: what reads the weight.
        weight: the initializer.
        axis: the axis of the weight that are the stream's channels.
        scale: what the norm before multiplies channels by, float32 ``[K]``; None if nothing.
        bias: what the norm before adds to channels, likewise.
        read: the value that the node reads, for what reads the stream; None for what makes it.
    """

    node: ir.Node
    weight: ir.Value
    axis: int
    scale: np.ndarray | None = None
    bias: np.ndarray | None = None
    read: ir.Value | None = None


@dataclasses.dataclass
class Stream:
    """Values of one residual stream, and everything that a change of its basis changes.

    Attributes:
        size: its channels.
        values: in the order they were found.
        norms: nodes that normalize it.
        factors: products with a constant for each channel, behind norms; their factors are in the
            scales of ``uses``.
        uses: weights before and behind.
        added: constants that are added to it.
    """

    size: int
    values: dict[ir.Value, None] = dataclasses.field(default_factory=dict)
    norms: dict[ir.Node, None] = dataclasses.field(default_factory=dict)
    factors: dict[ir.Node, int] = dataclasses.field(default_factory=dict)
    uses: list[Use] = dataclasses.field(default_factory=list)
    added: dict[ir.Node, int] = dataclasses.field(default_factory=dict)

    @property
    def centred(self) -> bool:
        """Whether norms take the mean off, so that the stream's values must have none."""
        return any(is_op(node, "LayerNormalization") for node in self.norms)


def find_streams(graph: Graph) -> tuple[list[Stream], list[str]]:
    """All residual streams that norms read, and why other values that norms read are none."""
    found: list[Stream] = []
    reasons: list[str] = []
    done: set[ir.Value] = set()
    for node in graph.graph:
        value = node.inputs[0] if is_op(node, *_NORMS) else None
        size = dim(value, -1)
        if value is None or value in done or size is None:
            continue
        search = _Search(Stream(size))
        try:
            search.grow(value)
            search.check()
        except NotLinear as reason:
            reasons.append(str(reason))
        else:
            found.append(search.stream)
        done |= set(search.stream.values)
    return found, list(dict.fromkeys(reasons))


class _Search:
    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def grow(self, start: ir.Value) -> None:
        todo = [start]
        while todo:
            value = todo.pop()
            if value in self.stream.values:
                continue
            self.stream.values[value] = None
            if dim(value, -1) != self.stream.size:
                raise NotLinear(f"{value.name} has other channels")
            if value.is_graph_output() or value.producer() is None:
                raise NotLinear(f"{value.name} is an input or a result of the model")
            todo += self._makers(value)
            for use in value.uses():
                todo += self._reader(use.node, use.idx, value)

    def check(self) -> None:
        """Every weight must be read by nothing else, and norms that centre need all to be so."""
        stream = self.stream
        nodes = {use.node for use in stream.uses}
        for use in stream.uses:
            others = {u.node for u in use.weight.uses()} - nodes
            if others:
                raise NotLinear(f"{use.weight.name} is read by {next(iter(others)).op_type}, too")
        plain = any(use.read in stream.values for use in stream.uses)
        if stream.centred and (plain or any(is_op(n, "RMSNormalization") for n in stream.norms)):
            raise NotLinear("the mean of its channels is read in one place and not in another")

    # -- the stream itself ----------------------------------------------------------------------

    def _makers(self, value: ir.Value) -> list[ir.Value]:
        """Values of the stream that ``value`` is made from; notes the weight that makes it."""
        node = value.producer()
        assert node is not None
        if is_op(node, "Add", "Mul", "Div"):
            return self._combined(node)
        if is_op(node, "Gather") and is_constant(node.inputs[0]):
            if rank(node.inputs[0]) != 2 or attribute(node, "axis", 0) not in (0, -2):
                raise NotLinear(f"{value.name} is looked up along channels")
            self._note(node, node.inputs[0], 1)
            return []
        if is_op(node, "MatMul"):
            self._product(node, made=True)
            return []
        if node.domain == HAL_DOMAIN and node.op_type == "MixtureOfExperts":
            self._note(node, node.inputs[4], 1)
            return []
        if is_op(node, *_MOVES) and _keeps_channels(node):
            return [v for v in _moved(node) if v is not None]
        raise NotLinear(f"{node.op_type} makes {value.name}")

    def _combined(self, node: ir.Node) -> list[ir.Value]:
        """Operands of a sum, or of a product with something that all channels share."""
        size, (a, b) = self.stream.size, node.inputs[:2]
        assert a is not None
        assert b is not None
        if is_op(node, "Add"):
            for index, value in enumerate((a, b)):
                if is_constant(value):
                    if dim(value, -1) != size:
                        raise NotLinear(f"{value.name} is added to {node.outputs[0].name}")
                    self.stream.added[node] = index
            return [v for v in (a, b) if not is_constant(v)]
        if _shared(b):
            return [a]
        if _shared(a) and is_op(node, "Mul"):
            return [b]
        raise NotLinear(f"channels of {node.outputs[0].name} are multiplied one by one")

    def _reader(self, node: ir.Node, index: int, value: ir.Value) -> list[ir.Value]:
        """Values of the stream that are made from ``value``; notes weights and norms behind it."""
        if is_op(node, "Shape"):
            return []
        if is_op(node, "Add", "Mul", "Div"):
            self._combined(node)
            return [node.outputs[0]]
        if is_op(node, *_NORMS) and index == 0:
            self._norm(node)
            return []
        if self._linear(node, index, value, None, None):
            return []
        if is_op(node, *_MOVES) and value in _moved(node) and _keeps_channels(node):
            return list(node.outputs)
        raise NotLinear(f"{node.op_type} reads {value.name}")

    # -- behind norms ---------------------------------------------------------------------------

    def _norm(self, node: ir.Node) -> None:
        result = node.outputs[0]
        last = attribute(node, "axis", -1) in (-1, (rank(result) or 0) - 1)
        if not last or any(v.uses() for v in node.outputs[1:]):
            raise NotLinear(f"{node.op_type} of {node.inputs[0].name} has other axes or results")  # type: ignore[union-attr]
        scale, bias = (self._vector(v) for v in (*node.inputs[1:3], None, None)[:2])
        self.stream.norms[node] = None
        self._normed(result, scale, bias)

    def _vector(self, value: ir.Value | None) -> np.ndarray | None:
        if value is None:
            return None
        found = array(value) if is_constant(value) else None
        if found is None and value.const_value is not None:
            found = value.const_value.numpy()
        if found is None or found.size not in (1, self.stream.size):
            raise NotLinear(f"the norm's {value.name} is no constant")
        flat = np.asarray(found, np.float32).reshape(-1)
        return np.broadcast_to(flat, (self.stream.size,)).copy()

    def _normed(self, value: ir.Value, scale: np.ndarray | None, bias: np.ndarray | None) -> None:
        if value.is_graph_output():
            raise NotLinear(f"{value.name} is a result of the model")
        for use in value.uses():
            node = use.node
            if is_op(node, "Shape") or self._linear(node, use.idx, value, scale, bias):
                continue
            if is_op(node, "Mul") and is_constant(node.inputs[1 - use.idx]):
                other = self._vector(node.inputs[1 - use.idx])
                assert other is not None
                self.stream.factors[node] = 1 - use.idx
                both = [None if v is None else v * other for v in (scale, bias)]
                self._normed(node.outputs[0], other if scale is None else both[0], both[1])
            elif is_op(node, *_MOVES) and value in _moved(node) and _keeps_channels(node):
                for result in node.outputs:
                    self._normed(result, scale, bias)
            else:
                raise NotLinear(f"{node.op_type} reads {value.name}, which is normalized")

    # -- weights --------------------------------------------------------------------------------

    def _linear(
        self,
        node: ir.Node,
        index: int,
        value: ir.Value,
        scale: np.ndarray | None,
        bias: np.ndarray | None,
    ) -> bool:
        """Note the weight by which ``node`` reads ``value``; False if there is none."""
        if index != 0:
            return False
        if is_op(node, "MatMul"):
            self._product(node, made=False, scale=scale, bias=bias, read=value)
            return True
        if node.domain == HAL_DOMAIN and node.op_type == "MixtureOfExperts":
            if bias is not None and bias.any():
                raise NotLinear("experts read a norm with a bias")
            self._note(node, node.inputs[3], 2, scale, None, value)
            return True
        return False

    def _product(
        self,
        node: ir.Node,
        *,
        made: bool,
        scale: np.ndarray | None = None,
        bias: np.ndarray | None = None,
        read: ir.Value | None = None,
    ) -> None:
        weight, axis = node.inputs[1], 1 if made else 0
        turn = weight.producer() if weight is not None else None
        if turn is not None and is_op(turn, "Transpose"):
            if list(attribute(turn, "perm", [1, 0])) != [1, 0]:
                raise NotLinear(f"{node.outputs[0].name} is no product with a matrix")
            if any(use.node.op_type != "MatMul" or use.idx != 1 for use in weight.uses()):  # type: ignore[union-attr]
                raise NotLinear(f"a weight of {node.outputs[0].name} is read in other ways")
            weight, axis, node = turn.inputs[0], 1 - axis, turn
        if rank(weight) != 2:
            raise NotLinear(f"{node.outputs[0].name} is no product with a weight")
        self._note(node, weight, axis, scale, bias, read)

    def _note(
        self,
        node: ir.Node,
        weight: ir.Value | None,
        axis: int,
        scale: np.ndarray | None = None,
        bias: np.ndarray | None = None,
        read: ir.Value | None = None,
    ) -> None:
        if weight is None or not is_constant(weight):
            raise NotLinear(f"{node.op_type} {node.outputs[0].name} has no constant weight")
        if dim(weight, axis) != self.stream.size:
            raise NotLinear(f"{weight.name} has other channels")
        if any(u.node is node and u.weight is weight and u.read is read for u in self.stream.uses):
            return
        self.stream.uses.append(Use(node, weight, axis, scale, bias, read))


def _moved(node: ir.Node) -> list[ir.Value | None]:
    """Inputs of a move that are data."""
    return list(node.inputs) if is_op(node, "Concat") else list(node.inputs[:1])


def _keeps_channels(node: ir.Node) -> bool:
    """Whether a move leaves the last axis as it is."""
    data, result = node.inputs[0], node.outputs[0]
    if dim(data, -1) is None or dim(data, -1) != dim(result, -1):
        return False
    last, axis = (rank(data) or 0) - 1, attribute(node, "axis", 0)
    if is_op(node, "Transpose"):
        perm = attribute(node, "perm")
        return perm is not None and list(perm)[-1] == last
    if is_op(node, "Gather", "GatherElements", "Concat", "Split"):
        return axis not in (-1, last)
    if is_op(node, "GatherND"):
        depth = dim(node.inputs[1], -1)
        return depth is not None and attribute(node, "batch_dims", 0) + depth <= last
    if is_op(node, "Slice"):
        axes = ints(node.inputs[3]) if len(node.inputs) > 3 else None
        return axes is not None and not {-1, last} & set(axes)
    if is_op(node, "Unsqueeze", "Squeeze"):
        return dim(data, -1) != 1
    return True


def _shared(value: ir.Value) -> bool:
    """Whether a factor is the same for all channels."""
    return rank(value) == 0 or dim(value, -1) == 1


__all__ = ["NotLinear", "Stream", "Use", "find_streams"]
