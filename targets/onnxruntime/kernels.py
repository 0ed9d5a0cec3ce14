"""Which ops the installed ONNX Runtime has kernels for: op, operator-set version and dtypes.

The table is read from the runtime itself, so it is right for whatever version is installed::

    table = kernel_table()
    table.match(node, version=27)     # Match(kernel=..., casts={}) or a Miss with the reason
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterable, Mapping

import onnx
import onnx_ir as ir
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as native

_OPEN_END = 2**31 - 1

NEWEST = 28
"""The newest operator set of ONNX that hal writes."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One registered kernel: the schema versions it serves, the dtypes each parameter may have."""

    first: int
    last: int
    types: Mapping[str, frozenset[str]]

    def serves(self, since_version: int) -> bool:
        """The runtime's rule: an open-ended kernel serves only the schema it was written for."""
        if self.first == since_version:
            return True
        return self.first < since_version <= self.last < _OPEN_END


@dataclasses.dataclass(frozen=True)
class Match:
    """A kernel fits once the type parameters in ``casts`` are cast to the dtypes given there."""

    casts: Mapping[str, ir.DataType]


@dataclasses.dataclass(frozen=True)
class Miss:
    """No kernel fits; ``reason`` says what there is instead."""

    reason: str


class KernelTable:
    """All kernels of the CPU provider, which every session has as its last resort.

    ``version`` is that of the runtime; ``kernels`` are (domain, op, kernel). Models may be stamped
    with operator sets of ONNX up to :attr:`newest`.
    """

    def __init__(self, version: str, kernels: Iterable[tuple[str, str, Kernel]]) -> None:
        self._version = version
        self.newest = NEWEST
        self._kernels: dict[tuple[str, str], list[Kernel]] = collections.defaultdict(list)
        for domain, op, kernel in kernels:
            self._kernels[_domain(domain), op].append(kernel)

    def until(self, newest: int) -> KernelTable:
        """The same kernels for models of operator sets up to ``newest``."""
        limited = KernelTable(self._version, ())
        limited._kernels, limited.newest = self._kernels, newest
        return limited

    def has(self, domain: str, op_type: str) -> bool:
        """Whether there is a kernel for any version and dtype of the op."""
        return (_domain(domain), op_type) in self._kernels

    def match(self, node: ir.Node, version: int) -> Match | Miss:
        """Find a kernel for ``node`` when the model is stamped with ``version`` of its domain.

        Values whose dtype is unknown fit anything.
        """
        if node.op_type == "Constant" and not node.domain:
            return _constant(node)
        name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        kernels = self._kernels.get((_domain(node.domain), node.op_type), [])
        if not kernels:
            return Miss(f"onnxruntime {self._version} has no kernel for {name}")
        if node.domain not in ("", "ai.onnx", "ai.onnx.ml"):
            return Match({})  # the runtime checks types of its own ops when the session is made
        try:
            schema = onnx.defs.get_schema(node.op_type, version, node.domain)
        except onnx.defs.SchemaError:
            return Miss(f"{name} does not exist in opset {version}")
        serving = [k for k in kernels if k.serves(schema.since_version)]
        if not serving:
            known = ", ".join(sorted({_range(k) for k in kernels}))
            return Miss(f"onnxruntime has {name} for opset {known}, not {schema.since_version}")
        types = parameter_types(node, schema)
        if _rough_in_half(node):
            half = tensor_string(ir.DataType.FLOAT16)
            return Match({name: ir.DataType.FLOAT for name, used in types.items() if half in used})
        fits = [casts for k in serving if (casts := _casts(node, k, types)) is not None]
        if fits:
            return Match(min(fits, key=len))
        return Miss(f"onnxruntime's {name}({schema.since_version}) does not take {_dtypes(types)}")


@functools.cache
def kernel_table() -> KernelTable:
    """The table of the installed runtime (read once)."""
    return KernelTable(
        onnxruntime.__version__,
        (
            (
                item.domain,
                item.op_name,
                Kernel(
                    item.version_range[0],
                    item.version_range[1],
                    {name: frozenset(values) for name, values in item.type_constraints.items()},
                ),
            )
            for item in native.get_all_opkernel_def()
            if item.provider == "CPUExecutionProvider"
        ),
    )


def parameter_types(node: ir.Node, schema: onnx.defs.OpSchema) -> dict[str, set[str]]:
    """What the type parameters (``T``) and formal names (``X``) of a schema stand for in ``node``.

    Values are ONNX type strings such as ``tensor(float)``; values of unknown type are left out.
    """
    result: dict[str, set[str]] = collections.defaultdict(set)
    for values, formals in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        if not formals:
            continue
        for index, value in enumerate(values):
            text = type_string(value)
            if text is not None:
                formal = formals[min(index, len(formals) - 1)]
                result[formal.type_str].add(text)
                result[formal.name].add(text)
    return dict(result)


def type_string(value: ir.Value | None) -> str | None:
    """ONNX's spelling of a value's type (``seq(tensor(float))``), or None when unknown."""
    if value is None or value.type is None:
        return None
    return _type_string(value.type)


def _type_string(kind: ir.TypeProtocol) -> str | None:
    if isinstance(kind, ir.SequenceType):
        return f"seq({_type_string(kind.elem_type)})"
    if isinstance(kind, ir.OptionalType):
        return f"optional({_type_string(kind.elem_type)})"
    if kind.dtype is ir.DataType.UNDEFINED:
        return None
    shell = "sparse_tensor" if isinstance(kind, ir.SparseTensorType) else "tensor"
    return f"{shell}({kind.dtype.name.lower()})"


def tensor_string(dtype: ir.DataType) -> str:
    """``tensor(float)`` for FLOAT."""
    return f"tensor({dtype.name.lower()})"


def _casts(
    node: ir.Node, kernel: Kernel, types: Mapping[str, set[str]]
) -> dict[str, ir.DataType] | None:
    """Casts that make ``kernel`` fit, or None when no exact ones exist."""
    casts: dict[str, ir.DataType] = {}
    for name, allowed in kernel.types.items():
        wrong = types.get(name, set()) - allowed
        if not wrong:
            continue
        if len(wrong) > 1 or node.op_type in _DTYPE_IS_MEANING:
            return None
        wider = (w for w in _wider(next(iter(wrong)), node.op_type) if tensor_string(w) in allowed)
        choice = next(wider, None)
        if choice is None:
            return None
        casts[name] = choice
    return {} if _cast_by_the_runtime(casts, types) else casts


def _rough_in_half(node: ir.Node) -> bool:
    """Attention on float16 without a cache: its kernel rounds more than the op's definition does.

    With a cache the kernel is kept, because casting the cache costs more at each step.
    """
    query = node.inputs[0] if node.inputs else None
    if node.op_type != "Attention" or query is None or query.dtype is not ir.DataType.FLOAT16:
        return False
    return len(node.inputs) < 5 or node.inputs[4] is None


def _cast_by_the_runtime(casts: Mapping[str, ir.DataType], types: Mapping[str, set[str]]) -> bool:
    """The runtime itself computes float16 in float, and keeps it so from node to node."""
    half = {tensor_string(ir.DataType.FLOAT16)}
    return all(d is ir.DataType.FLOAT and types[name] == half for name, d in casts.items())


_D = ir.DataType

# Computing in the wider dtype and rounding once is what these dtypes' own arithmetic means;
# integers wrap around the same way when the result is cut back.
_WIDER: dict[_D, tuple[_D, ...]] = {
    _D.FLOAT16: (_D.FLOAT,),
    _D.BFLOAT16: (_D.FLOAT,),
    _D.INT8: (_D.INT16, _D.INT32, _D.INT64),
    _D.UINT8: (_D.INT16, _D.INT32, _D.INT64),
    _D.INT16: (_D.INT32, _D.INT64),
    _D.UINT16: (_D.INT32, _D.UINT32, _D.INT64),
    _D.INT32: (_D.INT64,),
    _D.UINT32: (_D.INT64, _D.UINT64),
}

# Ops that only move elements may carry them in any dtype that holds each value exactly.
_CARRIER: dict[_D, tuple[_D, ...]] = {
    _D.BOOL: (_D.UINT8, _D.INT32, _D.INT64, _D.FLOAT),
    _D.INT8: (_D.FLOAT,),
    _D.UINT8: (_D.FLOAT,),
    _D.INT16: (_D.FLOAT,),
    _D.UINT16: (_D.FLOAT,),
    _D.INT32: (_D.DOUBLE,),
    _D.UINT32: (_D.DOUBLE,),
    _D.FLOAT8E4M3FN: (_D.FLOAT,),
    _D.FLOAT8E4M3FNUZ: (_D.FLOAT,),
    _D.FLOAT8E5M2: (_D.FLOAT,),
    _D.FLOAT8E5M2FNUZ: (_D.FLOAT,),
    _D.FLOAT8E8M0: (_D.FLOAT,),
    _D.INT4: (_D.INT8, _D.INT32),
    _D.UINT4: (_D.UINT8, _D.INT32),
    _D.INT2: (_D.INT8, _D.INT32),
    _D.UINT2: (_D.UINT8, _D.INT32),
}

_MOVES = frozenset(
    [
        "Compress",
        "Concat",
        "DepthToSpace",
        "Expand",
        "Flatten",
        "Gather",
        "GatherElements",
        "GatherND",
        "Identity",
        "OneHot",
        "Pad",
        "Reshape",
        "ReverseSequence",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "TensorScatter",
        "Tile",
        "Transpose",
        "Trilu",
        "Unsqueeze",
        "Where",
        "NonZero",
        "Unique",
        "Equal",
    ]
)

# The dtype is what these ops are about: a cast around them would change the result.
_DTYPE_IS_MEANING = frozenset(
    [
        "Bernoulli",
        "BitCast",
        "Cast",
        "CastLike",
        "ConstantOfShape",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "EyeLike",
        "Multinomial",
        "QuantizeLinear",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
        "If",
        "Loop",
        "Scan",
    ]
)


def _wider(text: str, op_type: str) -> Iterable[ir.DataType]:
    if not text.startswith("tensor("):
        return ()
    dtype = ir.DataType[text[7:-1].upper()]
    wider = _WIDER.get(dtype, ())
    return (*wider, *_CARRIER.get(dtype, ())) if op_type in _MOVES else wider


def _constant(node: ir.Node) -> Match | Miss:
    value = node.outputs[0]
    dtype = value.dtype
    attribute = node.attributes.get("value")
    if attribute is not None and not attribute.is_ref():
        dtype = attribute.as_tensor().dtype
    if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
        return Miss(f"onnxruntime has no tensors of {dtype.name.lower()}")
    return Match({})


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _range(kernel: Kernel) -> str:
    same = kernel.last in (kernel.first, _OPEN_END)
    return str(kernel.first) if same else f"{kernel.first}–{kernel.last}"


def _dtypes(types: Mapping[str, set[str]]) -> str:
    names = dict.fromkeys(
        t.removeprefix("tensor(").removesuffix(")") for v in types.values() for t in sorted(v)
    )
    return ", ".join(names) or "these types"
