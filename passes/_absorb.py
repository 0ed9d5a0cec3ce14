"""Linear maps after a cut, as matrices that move into the queries and the output.

The steps between carried values and an operand are linear per token, so the operand is
``k[h] = c @ M[h] + offset[h]`` with ``c`` the carried channels side by side. ``M`` is found by
running the steps on the unit vectors, one per token: whatever splits, reshapes, repeats or
concatenations are among them, they need no case here. Then, for each query head,

* ``q @ k.T = (q @ M.T) @ c.T`` + something that is the same for all keys, so the softmax drops it;
* ``p @ v = (p @ c) @ M + offset``, since each row of ``p`` sums to one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from hal.ir import IR_VERSION, OPSET, Graph
from hal.ir.evaluate import evaluate
from hal.passes._edit import Editor, attribute, producer
from hal.passes._retime import Retimed, copied_attributes
from hal.passes._tokens import TokenPaths

LAZY_BYTES = 1 << 24
"""Larger matrices are computed when their bytes are read."""


@dataclasses.dataclass(frozen=True)
class LinearMap:
    """``operand[h, t] = c[t] @ matrix[h] + offset[h]``; matrix float32 [kv heads, C, D]."""

    matrix: np.ndarray
    offset: np.ndarray
    """float32 [kv heads, D]."""


@dataclasses.dataclass(frozen=True)
class LinearProgram:
    """The steps between carried values and an operand, to be run on the unit vectors.

    It stands on its own, so that it can be run again after the steps have left the graph.
    """

    graph: Graph
    parts: tuple[tuple[str, int, tuple[int, ...]], ...]
    """Of each part: its input, its channels, and its layout as in :meth:`TokenPaths.extents`."""

    def solve(self) -> LinearMap:
        """Find the matrix.

        Raises:
            GraphError: nothing here runs one of the steps.
        """
        total, feeds, start = sum(size for _, size, _ in self.parts), {}, 0
        for name, size, extents in self.parts:
            unit = np.zeros((total + 1, size), np.float32)  # the last token is zero: the offset
            unit[start : start + size] = np.eye(size, dtype=np.float32)
            rest = [e for e in extents if e > 0]
            feeds[name] = np.moveaxis(unit.reshape(1, total + 1, *rest), 1, extents.index(-1))
            start += size
        (made,) = evaluate(self.graph, feeds).values()
        table = np.asarray(made, np.float32)[0].reshape(made.shape[1], total + 1, made.shape[3])
        return LinearMap(table[:, :total] - table[:, total:], table[:, total])


Solve = Callable[[], LinearMap]
"""Finds a map, again if it was too large to keep."""


@dataclasses.dataclass(frozen=True)
class Block:
    """How one carried value meets the queries: their channels ``low`` to ``high``."""

    part: ir.Value
    start: int
    """First of the part's channels among all carried ones."""
    low: int
    high: int
    identity: bool
    """These query channels are compared with the part's as they are, for every head."""


def linear_program(
    paths: TokenPaths, parts: Sequence[ir.Value], operand: ir.Value
) -> LinearProgram:
    """From the channels of ``parts``, side by side, to an operand."""
    sink = _Model(sum(paths.per_token(v) for v in parts) + 1)
    leaves = {part: sink.leaf(paths, part) for part in parts}
    result = Retimed(paths, leaves, sink, fresh=True)(operand)
    described = tuple(
        (leaves[v].name or "", paths.per_token(v), tuple(paths.extents(v))) for v in parts
    )
    return LinearProgram(sink.graph(result), described)


def _widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The tensor in float32, converted when it is read."""

    def convert() -> ir.TensorProtocol:
        return ir.tensor(tensor.numpy().astype(np.float32))

    shape = ir.Shape(tensor.shape.numpy())
    return ir.LazyTensor(convert, dtype=ir.DataType.FLOAT, shape=shape, name=tensor.name)


class _Model:
    """A graph of copies to be run on its own, in float32 (see :class:`hal.passes._retime.Sink`)."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._inputs: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        self._weights: dict[ir.Value, ir.Value] = {}
        self._count = 0

    def _name(self) -> str:
        self._count += 1
        return f"v{self._count}"

    def leaf(self, paths: TokenPaths, value: ir.Value) -> ir.Value:
        """An input in the layout of ``value``."""
        dims = [1 if e == 0 else self._tokens if e == -1 else e for e in paths.extents(value)]
        made = ir.Value(
            name=self._name(), shape=ir.Shape(dims), type=ir.TensorType(ir.DataType.FLOAT)
        )
        self._inputs.append(made)
        return made

    def copy(self, node: ir.Node, inputs: list[ir.Value | None]) -> list[ir.Value]:
        """Add a node; a cast between float types becomes one to float32."""
        attributes = copied_attributes(node)
        if node.op_type in ("Cast", "DequantizeLinear") and "to" in attributes:
            attributes["to"] = ir.DataType.FLOAT.value
        made = ir.node(
            node.op_type, inputs, attributes, domain=node.domain, num_outputs=len(node.outputs)
        )
        for value in made.outputs:
            value.name = self._name()
        self._nodes.append(made)
        return list(made.outputs)

    def constant(self, numbers: list[int]) -> ir.Value:
        """Add a vector of int64."""
        return self._initializer(ir.tensor(np.array(numbers, np.int64)))

    def weight(self, value: ir.Value) -> ir.Value:
        """Add a weight, or the computation of one; floats that numpy lacks become float32."""
        if value not in self._weights:
            tensor, node = value.const_value, value.producer()
            if tensor is None and node is not None:
                inputs = [None if v is None else self.weight(v) for v in node.inputs]
                outputs = self.copy(node, inputs)
                self._weights.update(zip(node.outputs, outputs, strict=True))
            else:
                assert tensor is not None
                half = tensor.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
                self._weights[value] = self._initializer(_widened(tensor) if half else tensor)
        return self._weights[value]

    def _initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        made = ir.Value(
            name=self._name(),
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self._weights[made] = made
        return made

    def graph(self, result: ir.Value) -> Graph:
        """What was copied, with ``result`` as the output."""
        result.type = result.type or ir.TensorType(ir.DataType.FLOAT)
        body = ir.Graph(
            self._inputs,
            [result],
            nodes=self._nodes,
            initializers=[v for k, v in self._weights.items() if k is v],
            opset_imports={"": OPSET},
            name="unit vectors",
        )
        return Graph(ir.Model(body, ir_version=IR_VERSION))


# --- queries and output ------------------------------------------------------------------------


def query_blocks(paths: TokenPaths, parts: Sequence[ir.Value], found: LinearMap) -> list[Block]:
    """Which query channels each part meets, and whether as they are."""
    blocks, start = [], 0
    for part in parts:
        size = paths.per_token(part)
        rows = found.matrix[:, start : start + size]
        used = np.flatnonzero(rows.any(axis=(0, 1)))
        low, high = (int(used[0]), int(used[-1]) + 1) if used.size else (0, 1)
        same = high - low == size and bool((rows[:, :, low:high] == np.eye(size)).all())
        blocks.append(Block(part, start, low, high, same))
        start += size
    return blocks


def absorbed_query(
    edit: Editor, paths: TokenPaths, blocks: Sequence[Block], solve: Solve
) -> ir.Value:
    """Queries ``[batch, heads, sequence, C]`` that are compared with the carried channels.

    ``solve`` finds the map again, for matrices that are left lazy.
    """
    made, heads = list[ir.Value](), paths.heads
    for block in blocks:
        piece = _channels(edit, paths.query, block.low, block.high)
        if not block.identity:
            size = paths.per_token(block.part)

            def rows(block: Block = block, size: int = size) -> np.ndarray:
                matrix = solve().matrix[:, block.start : block.start + size, block.low : block.high]
                return _per_query_head(heads, np.swapaxes(matrix, 1, 2))

            weight = _matrix(edit, paths, rows, (block.high - block.low, size), "query")
            piece = edit.op("MatMul", [piece, weight])
            piece.type = paths.query.type
        made.append(piece)
    if len(made) == 1:
        return made[0]
    joined = edit.op("Concat", made, {"axis": 3})
    joined.type = paths.query.type
    return joined


def absorbed_output(
    edit: Editor, paths: TokenPaths, summed: ir.Value, found: LinearMap, solve: Solve
) -> ir.Value:
    """The attention's output from its weighted sums of carried channels [batch, heads, s, C]."""
    made, heads, (_, rows, columns) = summed, paths.heads, found.matrix.shape
    if rows != columns or not (found.matrix == np.eye(rows)).all():

        def matrix() -> np.ndarray:
            return _per_query_head(heads, solve().matrix)

        made = edit.op("MatMul", [made, _matrix(edit, paths, matrix, (rows, columns), "output")])
        made.type = summed.type
    if found.offset.any():
        offset = _per_query_head(heads, found.offset[:, None, :])
        dtype = paths.value.dtype
        assert dtype is not None
        made = edit.op("Add", [made, edit.constant(offset.astype(dtype.numpy()), "offset")])
        made.type = summed.type
    return made


def _per_query_head(heads: int, table: np.ndarray) -> np.ndarray:
    """One matrix per query head from one per key-value head; a single one is left to broadcast."""
    if len(table) == 1:
        return np.asarray(table[0])
    return np.repeat(table, heads // len(table), axis=0)


def _matrix(
    edit: Editor,
    paths: TokenPaths,
    compute: Callable[[], np.ndarray],
    size: tuple[int, int],
    side: str,
) -> ir.Value:
    """Register a matrix per head, computed when read if it is large."""
    dtype = paths.key.dtype
    assert dtype is not None
    kv_heads = int(paths.shapes.shape[paths.key][1])
    shape = size if kv_heads == 1 else (paths.heads, *size)

    def tensor() -> ir.TensorProtocol:
        assert dtype is not None
        return ir.tensor(np.ascontiguousarray(compute().astype(dtype.numpy())))

    name = f"{paths.node.outputs[0].name}.{side}_map"
    large = int(np.prod(shape)) * dtype.bitwidth // 8 > LAZY_BYTES
    lazy = ir.LazyTensor(tensor, dtype=dtype, shape=ir.Shape(shape), name=name)
    return edit.tensor(lazy if large else tensor(), name)


def _channels(edit: Editor, value: ir.Value, low: int, high: int) -> ir.Value:
    """Channels ``low`` to ``high`` of queries, without a slice where they were concatenated."""
    assert value.shape is not None
    width = value.shape[-1]
    if (low, high) == (0, width):
        return value
    concat = producer(value, "Concat")
    if concat is not None and attribute(concat, "axis", 0) in (-1, len(value.shape) - 1):
        start = 0
        for part in concat.inputs:
            extent = part.shape[-1] if part is not None and part.shape is not None else None
            if part is None or not isinstance(extent, int):
                break
            if (start, start + extent) == (low, high):
                return part
            start += extent
    return sliced(edit, value, low, high)


def sliced(edit: Editor, value: ir.Value, low: int, high: int) -> ir.Value:
    """Channels ``low`` to ``high`` of ``[batch, heads, position, channels]``."""
    numbers = [edit.constant([n], name, np.int64) for n, name in ((low, "start"), (high, "end"))]
    axes, steps = edit.constant([3], "axes", np.int64), edit.constant([1], "steps", np.int64)
    made = edit.op("Slice", [value, *numbers, axes, steps])
    made.type = value.type
    return made
