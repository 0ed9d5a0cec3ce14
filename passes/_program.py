"""What a value is, found out by computing it: for values that depend on extents alone.

Positions and masks can be written in a hundred ways. Instead of matching them, the nodes that make
one are cut out of the graph and run for several extents of batch, sequence and past.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import sympy
from onnx.reference import ReferenceEvaluator

from hal.ir import IR_VERSION, OPSET
from hal.passes._edit import is_constant, static_shape
from hal.passes._symbolic import Shapes
from hal.passes.attention import MASKED

LIMIT = 80_000
"""Longest table that a program is taken to index when it indexes none."""


@dataclasses.dataclass(frozen=True)
class Program:
    """The computation of a value from extents: an evaluator, and the extents it reads.

    ``limit`` is the longest table it indexes, ``widest`` the largest constant it compares with.
    """

    run: ReferenceEvaluator
    extents: Mapping[str, np.ndarray]
    symbols: frozenset[Any]
    shapes: tuple[tuple[Any, ...], ...]
    limit: int
    widest: int

    def evaluate(self, values: Mapping[Any, int]) -> np.ndarray | None:
        """The value for numbers of all symbols; None if it cannot be computed for them."""
        feeds = {
            name: np.array(
                [int(e.subs(values)) for e in items.reshape(-1)], dtype=np.int64
            ).reshape(items.shape)
            for name, items in self.extents.items()
        }
        try:
            (result,) = self.run.run(None, feeds)
        except Exception:  # noqa: BLE001 - a table that is too short, an op the reference lacks
            return None
        return np.asarray(result)


def program_of(value: ir.Value, shapes: Shapes) -> Program | None:
    """Cut out what computes ``value``; None if it reads data, or constants that we cannot judge."""
    nodes, extents, constants = list[ir.Node](), dict[str, np.ndarray](), dict[str, ir.Value]()
    if not _collect(value, shapes, nodes, extents, constants, set()):
        return None
    limit, widest = LIMIT, 0
    for constant in constants.values():
        tensor = constant.const_value
        if tensor is None or tensor.nbytes > 2**26:
            return None
        if tensor.size > 64:
            limit = min(limit, max(static_shape(tensor)))
        else:
            widest = max(widest, _widest(tensor.numpy()))
    proto = _proto(nodes, extents, constants, value)
    symbols = frozenset(
        s for e in extents.values() for item in e.reshape(-1) for s in item.free_symbols
    )
    if any(isinstance(s, sympy.Dummy) for s in symbols):
        return None
    written = [abs(int(n)) for e in extents.values() for x in e.reshape(-1) for n in _integers(x)]
    widest = max([widest, *written])
    made = tuple(shapes.shape[v] for n in nodes for v in n.outputs if v in shapes.shape)
    return Program(ReferenceEvaluator(proto), extents, symbols, made, limit, widest)


def _integers(extent: Any) -> Iterable[Any]:
    """Numbers in an expression; an expression that is one number is a plain constant."""
    return tuple(extent.atoms(sympy.Integer))


def _widest(numbers: np.ndarray) -> int:
    """The largest constant that could be a window; the ends of the integer range are not."""
    if numbers.dtype.kind not in "iuf":
        return 0
    wide = np.abs(numbers.astype(np.float64))  # the bounds below do not fit every dtype
    candidates = wide[wide < (-MASKED if numbers.dtype.kind == "f" else 2**31 - 1)]
    return int(candidates.max()) if candidates.size else 0


def _collect(
    value: ir.Value,
    shapes: Shapes,
    nodes: list[ir.Node],
    extents: dict[str, np.ndarray],
    constants: dict[str, ir.Value],
    seen: set[ir.Value],
) -> bool:
    if value in seen:
        return True
    seen.add(value)
    if is_constant(value):
        constants[value.name or ""] = value
        return True
    node = value.producer()
    if node is None or node.domain not in ("", "ai.onnx"):
        return False
    if value in shapes.elements and value.dtype == ir.DataType.INT64:
        extents[value.name or ""] = shapes.elements[value]
        return True
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
           for a in node.attributes.values()):  # fmt: skip
        return False
    for source in node.inputs:
        if source is not None and not _collect(source, shapes, nodes, extents, constants, seen):
            return False
    nodes.append(node)
    return True


def _proto(
    nodes: Sequence[ir.Node],
    extents: Mapping[str, np.ndarray],
    constants: Mapping[str, ir.Value],
    mask: ir.Value,
) -> onnx.ModelProto:
    unique = list(dict.fromkeys(nodes))
    infos = [
        onnx.helper.make_tensor_value_info(n, onnx.TensorProto.INT64, list(e.shape))
        for n, e in extents.items()
    ]
    weights = []
    for name, value in constants.items():
        assert value.const_value is not None
        proto = ir.serde.serialize_tensor(value.const_value)
        proto.name = name
        weights.append(proto)
    made = onnx.helper.make_empty_tensor_value_info(mask.name or "")
    body = onnx.helper.make_graph(
        [ir.serde.serialize_node(n) for n in unique], "mask", infos, [made], weights
    )
    opsets = [onnx.helper.make_opsetid("", OPSET)]
    return onnx.helper.make_model(body, opset_imports=opsets, ir_version=IR_VERSION)
