"""Quantized weights whose codes are floats of 8 bits: no kernel of a product reads them.

They become floats of 32 bits in the build, so that products run as fast as unquantized ones;
rows that are looked up stay packed, and 256 numbers say what a code means.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from hal.ir.weights import as_bytes
from hal.targets.onnxruntime.moe import Emitter

_CODES = (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2)
_SMALLEST = 4096
_WIDENED = "8-bit float codes as floats of 32 bits"


@dataclasses.dataclass(frozen=True)
class _Table:
    """A constant ``DequantizeLinear`` of such codes: blocks of ``block`` along the last axis."""

    node: ir.Node
    codes: ir.Value
    scale: ir.Value
    shape: tuple[int, ...]
    block: int

    def floats(self) -> np.ndarray:
        """The weight, float32."""
        assert self.codes.const_value is not None
        assert self.scale.const_value is not None
        codes = self.codes.const_value.numpy().astype(np.float32)
        scale = self.scale.const_value.numpy().astype(np.float32)
        scale = scale.reshape(*self.shape[:-1], -1)
        return codes * np.repeat(scale, self.block, axis=-1)[..., : self.shape[-1]]


def widen_floats(graph: ir.Graph, mark: str) -> bool:
    """Rewrite ``graph`` in place; ``mark`` is where nodes say how their weight is stored."""
    changed = False
    for node in list(graph):
        table = _table(node)
        if table is None:
            continue
        changed = True
        for use in tuple(node.outputs[0].uses()):
            if _looks_up(use.node, use.idx) and table.shape[-1] % table.block == 0:
                _look_up(graph, use.node, table)
            elif _turns(use.node):
                _replace(graph, use.node.outputs[0], table, mark, turned=True)
        if node.outputs[0].uses():
            _replace(graph, node.outputs[0], table, mark, turned=False)
    return changed


def _table(node: ir.Node) -> _Table | None:
    if node.op_type != "DequantizeLinear" or node.domain or len(node.inputs) > 2:
        return None
    codes, scale = node.inputs
    if codes is None or scale is None or codes.dtype not in _CODES:
        return None
    if any(v.const_value is None or not v.is_initializer() for v in (codes, scale)):
        return None
    tensor, result = codes.const_value, node.outputs[0]
    assert tensor is not None
    if tensor.size < _SMALLEST or result.dtype is not ir.DataType.FLOAT:
        return None
    shape = tuple(int(d) for d in tensor.shape.numpy())
    axis, block = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)
    by_row = not block and len(shape) == 2 and axis in (0, -2)
    if not by_row and not (block and axis in (-1, len(shape) - 1)):
        return None
    return _Table(node, codes, scale, shape, block or shape[-1])


def _looks_up(node: ir.Node, index: int) -> bool:
    axis = node.attributes.get_int("axis", 0)
    return node.op_type == "Gather" and not node.domain and index == 0 and axis == 0


def _turns(node: ir.Node) -> bool:
    perm = list(node.attributes.get_ints("perm", [1, 0]))
    return node.op_type == "Transpose" and not node.domain and perm == [1, 0]


def _replace(graph: ir.Graph, value: ir.Value, table: _Table, mark: str, *, turned: bool) -> None:
    """Put the floats in the place of ``value``."""
    name = f"{table.codes.name}/{'columns' if turned else 'floats'}"
    new = graph.initializers.get(name)
    if new is None:
        shape = ir.Shape(table.shape[::-1] if turned else table.shape)

        def compute() -> ir.TensorProtocol:
            floats = table.floats()
            return ir.Tensor(np.ascontiguousarray(floats.T if turned else floats), name=name)

        lazy = ir.LazyTensor(compute, ir.DataType.FLOAT, shape, name=name)
        new = ir.Value(
            name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=shape, const_value=lazy
        )
        graph.register_initializer(new)
    for use in value.uses():
        use.node.metadata_props[mark] = _WIDENED
    value.replace_all_uses_with(new)


def _look_up(graph: ir.Graph, node: ir.Node, table: _Table) -> None:
    """``Gather(w, ids)`` of packed rows."""
    ids, result = node.inputs[1], node.outputs[0]
    assert ids is not None
    assert table.codes.dtype is not None
    emit = Emitter(result.name or "rows")
    rows = emit("Gather", [_bytes(graph, table), ids], dtype=ir.DataType.UINT8)
    which = emit("Cast", [rows], dtype=ir.DataType.INT32, to=ir.DataType.INT32.value)
    every = np.arange(256, dtype=np.uint8).view(table.codes.dtype.numpy()).astype(np.float32)
    numbers = emit("Gather", [emit.constant(every), which])
    scales = emit("Gather", [table.scale, ids], dtype=ir.DataType.FLOAT16)
    scales = emit("Cast", [scales], to=ir.DataType.FLOAT.value)
    last = emit.constant(np.array([-1], np.int64))
    blocked = emit.constant(np.array([-1, table.shape[-1] // table.block, table.block], np.int64))
    apart = emit("Reshape", [numbers, blocked])
    by_block = emit.constant(np.array([-1, table.shape[-1] // table.block], np.int64))
    scales = emit("Unsqueeze", [emit("Reshape", [scales, by_block]), last])
    size = emit("Concat", [
        emit("Shape", [ids], dtype=ir.DataType.INT64),
        emit.constant(np.array([table.shape[-1]], np.int64)),
    ], dtype=ir.DataType.INT64, axis=0)  # fmt: skip
    total = emit("Reshape", [emit("Mul", [apart, scales]), size], like=result)
    ir.convenience.replace_nodes_and_values(graph, node, [node], emit.nodes, [result], [total])


def _bytes(graph: ir.Graph, table: _Table) -> ir.Value:
    """The codes as bytes; the same place in the same file where they are in one."""
    tensor, name = table.codes.const_value, f"{table.codes.name}/bytes"
    assert tensor is not None
    if name in graph.initializers:
        return graph.initializers[name]
    shape = ir.Shape(table.shape)
    raw = as_bytes(tensor, shape, name)
    value = ir.Value(name=name, type=ir.TensorType(ir.DataType.UINT8), shape=shape, const_value=raw)
    graph.register_initializer(value)
    return value


__all__ = ["widen_floats"]
