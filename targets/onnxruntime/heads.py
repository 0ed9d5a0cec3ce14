"""Products with a quantized matrix for each head as one product a head.

The runtime's kernels of quantized weights take one matrix; a stack of them it would expand to
floats in each call.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from hal.ir import HAL_DOMAIN
from hal.targets.onnxruntime.moe import Emitter


def products_by_head(graph: ir.Graph) -> bool:
    """Rewrite ``MatMul(x [.., heads, M, k], Transpose(DequantizeLinear(codes)))`` in place.

    Says whether there was one.
    """
    found = False
    for node in list(graph):
        if node.op_type == "MatMul" and not node.domain:
            found |= _apart(graph, node)
    return found


def _apart(graph: ir.Graph, node: ir.Node) -> bool:
    x, across = node.inputs
    turn = _producer(across, "Transpose")
    decode = _producer(turn.inputs[0] if turn is not None else None, "DequantizeLinear")
    if x is None or turn is None or decode is None or x.shape is None or len(x.shape) < 3:
        return False
    shape = decode.outputs[0].shape
    if shape is None or len(shape) != 3 or list(turn.attributes.get_ints("perm", [])) != [0, 2, 1]:
        return False
    heads = shape[0]
    unpack = _producer(decode.inputs[0], "UnpackBits", HAL_DOMAIN)
    kept: dict[str, Any]
    constants = list(decode.inputs) if unpack is None else [*unpack.inputs, *decode.inputs[1:]]
    if not isinstance(heads, int) or x.shape[-3] != heads or not _divides(constants, heads):
        return False
    rounding = _producer(x, "RoundActivations", HAL_DOMAIN)
    source = x if rounding is None else rounding.inputs[0]
    result, axis = node.outputs[0], len(x.shape) - 3
    emit = Emitter(result.name or "heads")
    parts = []
    for head in range(heads):
        index = emit.constant(np.array([head], np.int64))
        rows = emit("Gather", [source, index], axis=axis)
        rows.shape = _one_head(x.shape, axis)
        if rounding is not None:
            kept = {n: a.as_int() for n, a in rounding.attributes.items()}
            rows = emit("RoundActivations", [rows], domain=HAL_DOMAIN, like=rows, **kept)
        codes, *others = [_part(graph, value, head) for value in constants]
        if unpack is not None:
            kept = {n: a.as_int() for n, a in unpack.attributes.items()}
            dtype = decode.inputs[0].dtype if decode.inputs[0] is not None else None
            assert dtype is not None
            codes = emit("UnpackBits", [codes], domain=HAL_DOMAIN, dtype=dtype, **kept)
            codes.shape = ir.Shape(shape[1:])
        kept = {n: a.as_int() for n, a in decode.attributes.items() if n != "axis"}
        weight = emit("DequantizeLinear", [codes, *others], axis=1, **kept)
        weight.shape = ir.Shape(shape[1:])
        turned = emit("Transpose", [weight], perm=[1, 0])
        turned.shape = ir.Shape([shape[2], shape[1]])
        part = emit("MatMul", [rows, turned])
        part.shape = _one_head(result.shape, axis)
        parts.append(part)
    whole = emit("Concat", parts, like=result, axis=axis)
    ir.convenience.replace_nodes_and_values(graph, node, [node], emit.nodes, [result], [whole])
    return True


def _producer(value: ir.Value | None, op_type: str, domain: str = "") -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and (node.op_type, node.domain) == (op_type, domain) else None


def _one_head(shape: ir.Shape | None, axis: int) -> ir.Shape | None:
    return None if shape is None else ir.Shape([*shape[:axis], 1, *shape[axis + 1 :]])


def _divides(constants: list[ir.Value | None], heads: int) -> bool:
    """Whether each is a constant of whole bytes for each head."""
    tensors = [value.const_value for value in constants if value is not None]
    return all(
        t is not None
        and int(t.shape.numpy()[0]) == heads
        and (t.size * t.dtype.bitwidth) % (8 * heads) == 0
        for t in tensors
    )


def _part(graph: ir.Graph, value: ir.Value | None, head: int) -> ir.Value | None:
    """The part of a constant that is one head's, in the file that it lies in, if it does."""
    if value is None:
        return None
    tensor, name = value.const_value, f"{value.name}/{head}"
    assert tensor is not None
    if name not in graph.initializers:
        extents = [int(d) for d in tensor.shape.numpy()]
        size, shape = tensor.nbytes // extents[0], ir.Shape(extents[1:])
        if isinstance(tensor, ir.ExternalTensor):
            made: ir.TensorProtocol = ir.ExternalTensor(
                tensor.location,
                (tensor.offset or 0) + head * size,
                size,
                tensor.dtype,
                shape=shape,
                name=name,
                base_dir=tensor.base_dir,
            )
        else:
            made = _slice(tensor, head * size, size, shape, name)
        new = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=made)
        graph.register_initializer(new)
    return graph.initializers[name]


def _slice(
    tensor: ir.TensorProtocol, start: int, size: int, shape: ir.Shape, name: str
) -> ir.TensorProtocol:
    raw = np.frombuffer(tensor.tobytes(), np.uint8)[start : start + size]
    if tensor.dtype.bitwidth < 8:
        return ir.PackedTensor(raw, tensor.dtype, shape=shape, name=name)
    array = raw.view(tensor.dtype.numpy()).reshape(shape.numpy())
    return ir.Tensor(array, tensor.dtype, name=name)


__all__ = ["products_by_head"]
