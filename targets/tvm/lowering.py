"""From an ONNX graph to a Relax function: the walk over nodes that all converters share.

A converter is a function from an :class:`Op` (one node in its context) to the node's outputs.
Tensors are :class:`Operand` values. Small integer tensors also carry their *content*, one Python
int or symbolic expression per element, so that arithmetic on shapes becomes symbolic shapes and
never runs. What a converter cannot do it refuses with a reason (:class:`~.dims.Refused`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import tvm
from tvm import relax, te, tirx

from hal.kernels.quantized_layout import Dot
from hal.targets.tvm.dims import Dim, Refused, Symbols, as_int
from hal.targets.tvm.dtypes import STORED_AS, plain
from hal.targets.tvm.storage import to_storage

EMBED_BYTES = 1024
"""Constants up to this size are part of the program; larger ones are passed as parameters."""

CONTENT_LIMIT = 512
"""Integer tensors up to this many elements are tracked element by element."""

_OPAQUE = 8
"""Value of TVM's attribute ``op_pattern`` for kernels that are not fused."""

_CONTENT_DTYPES = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)


@dataclasses.dataclass
class Operand:
    """A tensor value: ONNX dtype, shape, and a Relax expression or the known content or both."""

    dtype: ir.DataType
    shape: tuple[Dim, ...]
    expr: Any = None
    content: np.ndarray | None = None
    reshaped_from: Operand | None = None
    """The operand that this is a view of with other dims."""

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def stored(self) -> str:
        """Dtype of the TVM tensor."""
        return STORED_AS[self.dtype]


Result = Operand | Sequence[Operand | None]
Converter = Callable[["Op"], Result]


@dataclasses.dataclass(frozen=True)
class Shaping:
    """Numbers of the chip that kernels are shaped by."""

    lanes: int = 8
    cores: int = 1
    registers: int = 16
    dot: Dot | None = None
    plain: bool = False
    """Nothing that is scheduled already: a scheduler shapes every kernel for the chip."""


class Lowering:
    """State of one lowering: the block builder, operands of values, and the weights in use."""

    def __init__(self, builder: relax.BlockBuilder, shaping: Shaping, symbols: Symbols) -> None:
        self.builder = builder
        self.shaping = shaping
        self.symbols = symbols
        self.operands: dict[ir.Value, Operand] = {}
        self._kernels: dict[Any, Any] = {}
        self.prepared: dict[Hashable, list[Operand]] = {}
        """Activations in the form that quantized products read, shared by products."""

    # -- operands ---------------------------------------------------------------------------

    def operand(self, value: ir.Value) -> Operand:
        """The operand of ``value``; constants are embedded on first use."""
        if value not in self.operands:
            if value.const_value is None:
                raise Refused(f"value {value.name!r} is not a tensor that was computed before")
            self.operands[value] = self.embed(value.const_value.numpy(), value.const_value.dtype)
        return self.operands[value]

    def embed(self, array: np.ndarray, dtype: ir.DataType | None = None) -> Operand:
        """A constant that becomes part of the program."""
        dtype = dtype or ir.DataType.from_numpy(array.dtype)
        if dtype not in STORED_AS:
            raise Refused(f"dtype {dtype.name} is not a number")
        content = None
        if dtype in _CONTENT_DTYPES and array.size <= CONTENT_LIMIT:
            content = np.empty(array.shape, object)
            content[...] = array.tolist() if array.ndim else array.item()
            return Operand(dtype, array.shape, None, content)
        return Operand(dtype, array.shape, _constant(to_storage(array, dtype.name)), None)

    def from_content(self, content: np.ndarray, dtype: ir.DataType) -> Operand:
        """An integer tensor whose elements are known."""
        return Operand(dtype, content.shape, None, content)

    def expr(self, operand: Operand) -> Any:
        """The Relax expression of ``operand``, made from its content where it has none yet."""
        if operand.expr is None:
            operand.expr = self._materialize(operand)
        return operand.expr

    def _materialize(self, operand: Operand) -> Any:
        content = operand.content
        assert content is not None
        if all(isinstance(item, (int, bool)) for item in content.flat):
            return _constant(np.array(content.tolist(), operand.stored).reshape(content.shape))
        items = [i if not isinstance(i, bool) else int(i) for i in content.flat]
        if self.shaping.plain:
            return self._chosen(items, operand)
        vector = self.builder.emit(relax.op.shape_to_tensor(relax.ShapeExpr(items)))
        if operand.stored != "int64":
            vector = self.builder.emit(relax.op.astype(vector, operand.stored))
        if content.ndim != 1:
            vector = self.builder.emit(relax.op.reshape(vector, list(content.shape)))
        return vector

    def _chosen(self, items: Sequence[Any], operand: Operand) -> Any:
        """Elements as a kernel that picks among them: they are needed where kernels run."""

        def element(*indices: Any) -> Any:
            flat: Any = tirx.const(0, "int64")
            for index, dim in zip(indices, operand.shape, strict=True):
                flat = flat * _index(dim) + index
            value = _index(items[-1])
            for place in reversed(range(len(items) - 1)):
                value = tirx.Select(flat == place, _index(items[place]), value)
            return value.astype(operand.stored)

        shape = [_index(d) for d in operand.shape]
        return self.te(lambda: te.compute(shape, element, name="shape"), name="shape").expr

    def wrap(self, expr: Any, dtype: ir.DataType | None = None) -> Operand:
        """An operand for a Relax tensor expression."""
        kind = expr.ty
        if kind.shape is None:
            raise Refused("the rank of a result is unknown")
        shape = tuple(self.symbols.simplify(as_int(d)) for d in kind.shape.values)
        return Operand(dtype or plain(str(kind.dtype)), shape, expr)

    # -- emitting ---------------------------------------------------------------------------

    def emit(self, call: Any, dtype: ir.DataType | None = None) -> Operand:
        """Bind a Relax call that gives one tensor."""
        return self.wrap(self.builder.emit(call), dtype)

    def te(
        self,
        function: Callable[..., Any],
        *operands: Operand,
        name: str = "op",
        dtype: ir.DataType | None = None,
    ) -> Any:
        """Bind a tensor-expression kernel.

        ``function`` gets a ``te.Tensor`` for each operand and returns one or several; dims that
        its body mentions are passed along. Returns an operand, or a list for several outputs.
        """
        exprs = [self.expr(o) for o in operands]
        tensors = [
            te.placeholder([_index(d) for d in o.shape], o.stored, name=f"in{i}")
            for i, o in enumerate(operands)
        ]
        result = function(*tensors)
        single = isinstance(result, te.Tensor)
        outputs = [result] if single else list(result)
        outputs = [_distinct(o, tensors) for o in outputs]
        kernel, scalars = self._prim_func(tensors, outputs)
        var = self.builder.add_func(kernel, re.sub(r"\W", "_", name))
        kinds = [relax.TensorType([as_int(d) for d in o.shape], str(o.dtype)) for o in outputs]
        bound = self.builder.emit(
            relax.call_tir(var, [*exprs, *scalars], kinds[0] if single else kinds)
        )
        if single:
            return self.wrap(bound, dtype)
        return [self.wrap(self.builder.emit(bound[i])) for i in range(len(outputs))]

    def _prim_func(self, tensors: Sequence[Any], outputs: Sequence[Any]) -> tuple[Any, list[Any]]:
        """The kernel, and the symbols that it takes as scalars since no input's shape has them."""
        kernel = te.create_prim_func([*tensors, *outputs], "int64")
        used = list(tirx.analysis.undefined_vars(kernel.body))
        for tensor in (*tensors, *outputs):
            for dim in tensor.shape:
                if not isinstance(dim, (int, tirx.IntImm)):
                    used.extend(tirx.analysis.undefined_vars(dim))
        bound = [d for t in tensors for d in t.shape if isinstance(d, tvm.ir.Var)]
        scalars = [
            symbol
            for symbol in self.symbols.all()
            if any(symbol.same_as(u) for u in used) and not any(symbol.same_as(b) for b in bound)
        ]
        if scalars:
            # TVM 0.27: FuseTIR stops with "VarRemapGet(source) == nullptr" on fused kernels that
            # take scalars, so these stay by themselves.
            kernel = te.create_prim_func([*tensors, *scalars, *outputs], "int64")
            kernel = kernel.with_attr("op_pattern", _OPAQUE)
        # Passes of TVM want no symbol to be defined twice in a module.
        return tvm.s_tir.renew_defs(kernel.without_attr("global_symbol")), scalars

    def emit_scalar(self, operand: Operand) -> Operand:
        """A tensor of one element, reshaped to rank 0."""
        if operand.rank == 0:
            return operand
        return self.emit(relax.op.reshape(self.expr(operand), ()), operand.dtype)

    def compute(
        self,
        shape: Sequence[Dim],
        body: Callable[..., Any],
        *operands: Operand,
        name: str = "op",
        dtype: ir.DataType | None = None,
    ) -> Operand:
        """Bind ``te.compute``: ``body(*tensors, indices)`` is the element at ``indices``."""

        def kernel(*tensors: Any) -> Any:
            return te.compute([_index(d) for d in shape], lambda *i: body(*tensors, i), name=name)

        return self.te(kernel, *operands, name=name, dtype=dtype)

    def call_kernel(
        self,
        kernel: Any,
        operands: Sequence[Operand],
        outputs: Sequence[tuple[Sequence[Dim], str]],
        name: str,
        scalars: Sequence[Dim] = (),
    ) -> list[Operand]:
        """Bind a call of a hand-written kernel; ``outputs`` are shapes and TVM dtypes.

        Raises:
            Refused: kernels are to be plain, and this one is scheduled.
        """
        var = self._added(kernel, name)
        kinds = [relax.TensorType(list(shape), dtype) for shape, dtype in outputs]
        arguments = [*(self.expr(o) for o in operands), *(_index(s) for s in scalars)]
        bound = self.builder.emit(
            relax.call_tir(var, arguments, kinds[0] if len(kinds) == 1 else kinds)
        )
        if len(kinds) == 1:
            return [self.wrap(bound)]
        return [self.wrap(self.builder.emit(bound[i])) for i in range(len(kinds))]

    def _added(self, kernel: Any, name: str) -> Any:
        """The module's variable for a kernel; finding out that it is there already takes long."""
        if self.shaping.plain and "tirx.is_scheduled" in kernel.attrs:
            raise Refused(f"the kernel {name!r} is written for the vectors of a processor")
        if kernel not in self._kernels:
            plain_ = kernel.without_attr("global_symbol")
            self._kernels[kernel] = self.builder.add_func(plain_, name)
        return self._kernels[kernel]

    def call_in_place(self, kernel: Any, operands: Sequence[Operand], name: str) -> Operand:
        """Bind a call of a hand-written kernel that changes its first operand.

        Raises:
            Refused: kernels are to be plain, and this one is scheduled.
        """
        var = self._added(kernel, name)
        target = operands[0]
        kind = relax.TensorType(list(target.shape), target.stored)
        arguments = relax.Tuple([self.expr(o) for o in operands])
        bound = self.builder.emit(relax.op.call_tir_inplace(var, arguments, [0], kind))
        return self.wrap(bound, target.dtype)

    # -- the walk ---------------------------------------------------------------------------

    def lower_node(self, node: ir.Node, converter: Converter) -> None:
        """Convert one node and remember its outputs.

        Raises:
            Refused: the node cannot be converted.
        """
        try:
            result = converter(Op(self, node))
        except (Refused, MemoryError):
            raise
        except Exception as error:
            text = str(error).strip().splitlines()
            raise Refused(
                f"{type(error).__name__}: {text[-1] if text else 'no message'}"
            ) from error
        results = [result] if isinstance(result, Operand) else list(result)
        for value, operand in zip(node.outputs, results, strict=False):
            if operand is not None:
                self.operands[value] = operand
            elif value.uses() or value.is_graph_output():
                raise Refused(f"output {value.name!r} is not computed")


class Op:
    """One node as its converter sees it."""

    def __init__(self, context: Lowering, node: ir.Node) -> None:
        self.context = context
        self.node = node
        self.symbols = context.symbols

    # -- inputs -----------------------------------------------------------------------------

    def has(self, index: int) -> bool:
        """Whether input ``index`` is given."""
        return index < len(self.node.inputs) and self.node.inputs[index] is not None

    def wants(self, index: int) -> bool:
        """Whether output ``index`` is used."""
        outputs = self.node.outputs
        return index < len(outputs) and bool(outputs[index].name)

    def input(self, index: int) -> Operand:
        """Input ``index`` as an operand."""
        if not self.has(index):
            raise Refused(f"input {index} is missing")
        value = self.node.inputs[index]
        assert value is not None
        return self.context.operand(value)

    def optional(self, index: int) -> Operand | None:
        """Input ``index``, or None if it was left out."""
        return self.input(index) if self.has(index) else None

    def inputs(self) -> list[Operand]:
        """All inputs; none may be missing."""
        return [self.input(i) for i in range(len(self.node.inputs))]

    def content(self, index: int) -> np.ndarray | None:
        """Known elements (ints, or expressions over dims) of an integer input, or None."""
        return self.input(index).content

    def constant(self, index: int) -> np.ndarray | None:
        """The value of input ``index`` if it is known at compile time."""
        if not self.has(index):
            return None
        value = self.node.inputs[index]
        assert value is not None
        if value.const_value is not None:
            return value.const_value.numpy()
        content = self.input(index).content
        if content is not None and all(isinstance(i, (int, bool)) for i in content.flat):
            stored = self.input(index).stored
            return np.array(content.tolist(), stored).reshape(content.shape)
        return None

    def needs(self, index: int, what: str) -> np.ndarray:
        """The constant value of input ``index``.

        Raises:
            Refused: it is computed at run time.
        """
        array = self.constant(index)
        if array is None:
            raise Refused(f"{what} must be known at compile time")
        return array

    def require(self, index: int, allowed: frozenset[ir.DataType]) -> Operand:
        """Input ``index``, if its dtype is among ``allowed``.

        Raises:
            Refused: it has another dtype.
        """
        operand = self.input(index)
        if operand.dtype not in allowed:
            raise Refused(f"{self.node.op_type} on {operand.dtype.name} is not implemented")
        return operand

    # -- attributes -------------------------------------------------------------------------

    def attribute(self, name: str, default: Any = None) -> Any:
        """Python value of an attribute; lists are lists, strings are ``str``."""
        attr = self.node.attributes.get(name)
        if attr is None or attr.value is None:
            return default
        value = attr.value
        return list(value) if isinstance(value, (tuple, list)) else value

    def axis(self, default: int, rank: int) -> int:
        """The attribute ``axis`` as a non-negative number."""
        axis = int(self.attribute("axis", default))
        return axis + rank if axis < 0 else axis

    # -- outputs ----------------------------------------------------------------------------

    def declared(self, index: int = 0) -> tuple[Dim, ...] | None:
        """Static shape that the model declares for output ``index``, or None."""
        shape = self.node.outputs[index].shape
        if shape is None or not all(isinstance(d, int) for d in shape):
            return None
        return tuple(int(d) for d in shape)  # type: ignore[arg-type]

    def te(self, function: Callable[..., Any], *operands: Operand, dtype: Any = None) -> Any:
        """:meth:`Lowering.te` with the op's name."""
        return self.context.te(function, *operands, name=self.node.op_type.lower(), dtype=dtype)

    def compute(
        self, shape: Sequence[Dim], body: Callable[..., Any], *operands: Operand, dtype: Any = None
    ) -> Operand:
        """:meth:`Lowering.compute` with the op's name."""
        name = self.node.op_type.lower()
        return self.context.compute(shape, body, *operands, name=name, dtype=dtype)


def _constant(array: np.ndarray) -> Any:
    return relax.const(tvm.runtime.tensor(np.ascontiguousarray(array).reshape(array.shape)))


def _index(dim: Dim) -> Any:
    return tirx.const(dim, "int64") if isinstance(dim, int) else dim


def _distinct(output: Any, inputs: Sequence[Any]) -> Any:
    """An output that is an input itself needs a copy of its own."""
    if any(output.same_as(tensor) for tensor in inputs):
        return te.compute(output.shape, lambda *i: output(*i), name="copy")
    return output
