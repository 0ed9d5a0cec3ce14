"""The whole graph: :func:`lower` makes a Relax module, :func:`check` says what it would refuse.

lowered = lower(graph, Shaping(lanes=16, cores=8))
lowered.module["main"]          # main(inputs..., weights...) -> tuple of outputs
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping

import onnx_ir as ir
import tvm
from tvm import relax

from hal.errors import UnsupportedError
from hal.ir import Graph, dtype_name
from hal.ir.cache_plan import in_place, plan_of
from hal.targets.tvm.converters import find
from hal.targets.tvm.dims import Dim, Refused, Symbols
from hal.targets.tvm.dtypes import STORED_AS
from hal.targets.tvm.lowering import EMBED_BYTES, Lowering, Operand, Shaping
from hal.targets.tvm.pipeline import TRUSTED
from hal.targets.tvm.program import STEP, Port


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A Relax module whose ``main`` takes ``inputs`` then ``weights`` and returns ``outputs``.

    ``single``: axes of inputs by name; where all of them have one element, :data:`STEP` does the
    same as ``main`` (no axes: there is no such function).
    """

    module: tvm.IRModule
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    weights: tuple[ir.Value, ...]
    single: tuple[tuple[str, int], ...] = ()


def lower(graph: Graph, shaping: Shaping) -> Lowered:
    """Lower a legalized graph.

    Raises:
        UnsupportedError: a node cannot be lowered; the text lists nodes and reasons.
    """
    builder = relax.BlockBuilder()
    pools = frozenset(in_place(graph).values())
    walk = _Walk(graph.graph, shaping, builder, pools)
    refused = walk.run()
    if refused:
        lines = [f"{node.op_type} {node.name or ''}: {why}" for node, why in refused.items()]
        raise UnsupportedError(
            f"{len(refused)} nodes of {graph.name!r} cannot be lowered: " + "; ".join(lines[:10]),
            "let another backend run them, or allow fallback to the host",
        )
    dims = step_dims(graph)
    if not dims:
        return walk.finish()
    step = _Walk(graph.graph, shaping, builder, pools, dict.fromkeys(dims, 1))
    if step.run(STEP):  # an op may need a dim that it can only check at run time
        return walk.finish(without=STEP)
    single = tuple(
        (value.name or "", axis)
        for value in graph.graph.inputs
        for axis, dim in enumerate(value.shape or ())
        if isinstance(dim, ir.SymbolicDim) and dim.value in dims
    )
    return dataclasses.replace(walk.finish(), single=single)


def step_dims(graph: Graph) -> frozenset[str]:
    """Dims that are 1 when a language model takes one token of one row; none for other graphs.

    With them known, kernels have static shapes: no shape arithmetic between them, memory that is
    planned, and no threads started for a handful of numbers.
    """
    plan = plan_of(graph)
    if plan is None:
        return frozenset()
    carried = {g.table for g in plan.groups} | set(in_place(graph).values())
    return frozenset(
        dim.value
        for value in graph.graph.inputs
        if value.name not in carried and value.shape is not None
        for dim in value.shape
        if isinstance(dim, ir.SymbolicDim) and dim.value is not None and dim.value.isidentifier()
    )


def check(graph: ir.Graph, shaping: Shaping) -> dict[ir.Node, str]:
    """Nodes that :func:`lower` would refuse, and why; a dry run, nothing is compiled."""
    return _Walk(graph, shaping, relax.BlockBuilder()).run()


class _Walk:
    """One pass over the nodes inside the scope of a Relax function."""

    def __init__(
        self,
        graph: ir.Graph,
        shaping: Shaping,
        builder: relax.BlockBuilder,
        pools: Collection[str] = (),
        fixed: Mapping[str, int] | None = None,
    ) -> None:
        self._graph = graph
        self._symbols = Symbols(fixed)
        self._builder = builder
        self._context = Lowering(self._builder, shaping, self._symbols)
        self._pools = pools
        self._inputs: list[ir.Value] = []
        self._weights = [v for v in self._graph.initializers.values() if is_weight(v)]
        self._lowered: Lowered | None = None

    def run(self, name: str = "main") -> dict[ir.Node, str]:
        """Lower to a function of that name; the nodes that were refused."""
        refused: dict[ir.Node, str] = {}
        variables = []
        for value in self._graph.inputs:
            if value.name in self._graph.initializers:
                continue
            try:
                operand = self._placeholder(value)
            except Refused as reason:
                refused.update({node: str(reason) for node in value.consumers()})
                continue
            self._inputs.append(value)
            variables.append(operand.expr)
        for value in self._weights:
            variables.append(self._placeholder(value).expr)
        mine = [i for i, value in enumerate(self._inputs) if value.name in self._pools]
        mine += range(len(self._inputs), len(variables))
        with self._builder.function(name, variables, attrs={TRUSTED: mine}):
            with self._builder.dataflow():
                refused.update(self._nodes(self._graph))
                outputs = self._outputs(refused)
                bound = self._builder.emit_output(relax.Tuple(outputs))
            self._builder.emit_func_output(bound)
        return refused

    def finish(self, without: str = "") -> Lowered:
        """The finished module, after :meth:`run` refused nothing; one function may be left out."""
        module = self._builder.get()
        kept = {v: f for v, f in module.functions_items() if v.name_hint != without}
        return Lowered(
            tvm.IRModule(kept, attrs=module.attrs) if without else module,
            tuple(Port(v.name or "", _dtype(v).name) for v in self._inputs),
            tuple(
                Port(v.name or "", self._context.operand(v).dtype.name) for v in self._graph.outputs
            ),
            tuple(self._weights),
        )

    def _placeholder(self, value: ir.Value) -> Operand:
        """A parameter of the Relax function for ``value``."""
        dtype = _dtype(value)
        if value.shape is None:
            raise Refused(f"the rank of {value.name!r} is unknown")
        shape = tuple(self._dim(d) for d in value.shape)
        var = relax.Var(value.name or "value", relax.TensorType(list(shape), STORED_AS[dtype]))
        self._context.operands[value] = Operand(dtype, shape, var)
        return self._context.operands[value]

    def _dim(self, dim: int | ir.SymbolicDim) -> Dim:
        return dim if isinstance(dim, int) else self._symbols.parse(dim.value)

    def _nodes(self, nodes: Iterable[ir.Node]) -> dict[ir.Node, str]:
        refused: dict[ir.Node, str] = {}
        for node in nodes:
            try:
                self._context.lower_node(node, find(node))
            except Refused as reason:
                refused[node] = str(reason)
                self._assume_outputs(node)
        return refused

    def _assume_outputs(self, node: ir.Node) -> None:
        """Go on with unknown tensors of the declared shapes, to judge the nodes that follow."""
        for value in node.outputs:
            if value in self._context.operands:
                continue
            try:
                dtype, shape = _dtype(value), value.shape
            except Refused:
                continue
            if shape is None:
                continue
            dims = [self._dim(d) for d in shape]
            self._context.operands[value] = self._context.emit(
                relax.op.zeros(relax.ShapeExpr(dims), STORED_AS[dtype]), dtype
            )

    def _outputs(self, refused: dict[ir.Node, str]) -> list[relax.Expr]:
        outputs = []
        for value in self._graph.outputs:
            try:
                outputs.append(self._context.expr(self._context.operand(value)))
            except Refused as reason:
                producer = value.producer()
                if producer is not None:
                    refused.setdefault(producer, str(reason))
        return outputs


def is_weight(value: ir.Value) -> bool:
    """Whether an initializer is passed as a parameter (a small one is part of the program)."""
    tensor = value.const_value
    if tensor is None or not (value.uses() or value.is_graph_output()):
        return False
    return tensor.nbytes > EMBED_BYTES and tensor.dtype in STORED_AS


def unsupported_values(node: ir.Node) -> Iterator[str]:
    """Names of inputs that are no tensors of numbers."""
    for value in node.inputs:
        if value is not None and value.dtype is not None and value.dtype not in STORED_AS:
            yield f"{value.name} is {dtype_name(value.dtype)}"


def _dtype(value: ir.Value) -> ir.DataType:
    if not isinstance(value.type, (ir.TensorType, type(None))):
        raise Refused(f"{value.name!r} is no tensor")
    if value.dtype is None or value.dtype not in STORED_AS:
        name = "unknown" if value.dtype is None else value.dtype.name
        raise Refused(f"dtype {name} of {value.name!r} is not supported")
    return value.dtype
