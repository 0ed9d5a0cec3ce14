"""Layers with static activations as the runtime's integer kernels want them.

The runtime itself replaces ``DequantizeLinear → op → QuantizeLinear`` by integer kernels. Three
things it does not see:

- weights of products are stored ``[out, in]`` and transposed in the graph: here the codes are;
- a ``Relu`` that cannot go into the layer before it has no integer kernel, ``LeakyRelu`` has;
- weights without coded activations, and those of ``ConvTranspose``, have no integer kernel, and the
  runtime would decode them in every call: as products they are constants, folded at load.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

_CONVOLUTIONS = ("Conv", "ConvTranspose")
_CODES = (ir.DataType.UINT8, ir.DataType.INT8)

EXPANDED_KEY = "hal.expanded"
"""Node metadata: the node makes a float weight of codes once, when the model is loaded."""


def fuse_static(model: ir.Model) -> bool:
    """Rewrite ``model`` in place; say whether anything changed."""
    changed = False
    for node in list(model.graph):
        if node.domain:
            continue
        if node.op_type == "MatMul":
            changed |= _product(model.graph, node)
        elif node.op_type in _CONVOLUTIONS:
            changed |= _convolution(model.graph, node)
        elif node.op_type == "Relu":
            changed |= _relu(node)
    return changed


def is_coded(value: ir.Value | None) -> bool:
    """Whether ``value`` is decoded from activations with one scale."""
    node = value.producer() if value is not None else None
    if node is None or node.domain or node.op_type != "DequantizeLinear":
        return False
    codes, scale = node.inputs[:2]
    single = scale is not None and scale.const_value is not None and scale.const_value.size == 1
    return codes is not None and codes.producer() is not None and codes.dtype in _CODES and single


def runs_on_codes(node: ir.Node) -> bool:
    """Whether the decoded constant ``node`` goes into integer kernels."""
    readers = [use.node for use in node.outputs[0].uses()]
    return bool(readers) and all(
        not reader.domain
        and is_coded(reader.inputs[0])
        and (reader.op_type == "MatMul" or (reader.op_type == "Conv" and _is_coded_again(reader)))
        for reader in readers
    )


def _is_coded_again(node: ir.Node) -> bool:
    """Whether a convolution's result goes into codes and nowhere else."""
    readers = [use.node for use in node.outputs[0].uses()]
    if len(readers) == 1 and readers[0].op_type in ("Relu", "Clip"):
        readers = [use.node for use in readers[0].outputs[0].uses()]
    return bool(readers) and all(reader.op_type == "QuantizeLinear" for reader in readers)


def _weight(value: ir.Value | None) -> ir.Node | None:
    """The node that decodes a constant without blocks, if ``value`` is one."""
    node = value.producer() if value is not None else None
    if node is None or node.domain or node.op_type != "DequantizeLinear":
        return None
    if node.attributes.get_int("block_size", 0):
        return None
    constants = [v for v in node.inputs if v is not None]
    return (
        node if all(v.is_initializer() and v.const_value is not None for v in constants) else None
    )


def _product(graph: ir.Graph, node: ir.Node) -> bool:
    """``MatMul(codes, Transpose(codes [N, K]))``: the weight's codes as ``[K, N]``."""
    turn = node.inputs[1].producer() if node.inputs[1] is not None else None
    if turn is None or turn.domain or turn.op_type != "Transpose" or not is_coded(node.inputs[0]):
        return False
    weight = _weight(turn.inputs[0])
    if weight is None or len(weight.inputs) != 2 or weight.inputs[0].dtype is not _CODES[1]:  # type: ignore[union-attr]
        return False
    codes, scale = weight.inputs
    assert codes is not None
    assert scale is not None
    if codes.shape is None or len(codes.shape) != 2:
        return False
    across, columns = _across(graph, codes), int(codes.shape.numpy()[0])
    # Only with zero points, onnxruntime 1.32 makes an integer op of a product and its bias.
    zero = _constant(graph, np.zeros(columns, np.int8), f"{across.name}/zero")
    decode = ir.node("DequantizeLinear", [across, _float32(graph, scale), zero], {"axis": 1})
    decode.name = decode.outputs[0].name = f"{node.outputs[0].name}/weight"
    decode.outputs[0].type, decode.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), across.shape
    graph.insert_before(node, decode)
    node.replace_input_with(1, decode.outputs[0])
    _code_bias(graph, node, decode)
    _remove(turn, weight)
    return True


def _across(graph: ir.Graph, codes: ir.Value) -> ir.Value:
    """Codes ``[N, K]`` as ``[K, N]``, turned when the build writes them."""
    name = f"{codes.name}/across"
    if name not in graph.initializers:
        tensor = codes.const_value
        assert tensor is not None
        shape = ir.Shape(list(reversed(tensor.shape.numpy())))
        turned = ir.LazyTensor(
            lambda: ir.Tensor(np.ascontiguousarray(tensor.numpy().T)),
            dtype=ir.DataType.INT8,
            shape=shape,
            name=name,
        )
        value = ir.Value(name=name, type=codes.type, shape=shape, const_value=turned)
        graph.register_initializer(value)
    return graph.initializers[name]


def _code_bias(graph: ir.Graph, node: ir.Node, weight: ir.Node) -> None:
    """The bias of a product of matrices as int32: the runtime makes one op of the two first."""
    x, uses = node.inputs[0], tuple(node.outputs[0].uses())
    if x is None or x.shape is None or len(x.shape) != 2 or len(uses) != 1:
        return
    add, decode = uses[0].node, x.producer()
    if add.domain or add.op_type != "Add" or decode is None or node.outputs[0].is_graph_output():
        return
    bias = add.inputs[1 - uses[0].idx]
    if bias is None or bias.const_value is None or not bias.is_initializer():
        return
    scale = _array(decode.inputs[1]).reshape(()) * _array(weight.inputs[1])
    codes = np.rint(_array(bias).astype(np.float64) / scale)
    if codes.shape != scale.shape or not (np.abs(codes) < 2**30).all():
        return
    name = f"{node.outputs[0].name}/bias"
    inputs = [
        _constant(graph, codes.astype(np.int32), f"{name}/codes"),
        _constant(graph, scale.astype(np.float32), f"{name}/scale"),
        _constant(graph, np.zeros(codes.shape, np.int32), f"{name}/zero"),
    ]
    made = ir.node("DequantizeLinear", inputs, {"axis": 0})
    made.name = made.outputs[0].name = name
    made.outputs[0].type, made.outputs[0].shape = bias.type, bias.shape
    graph.insert_before(add, made)
    add.replace_input_with(1 - uses[0].idx, made.outputs[0])


def _array(value: ir.Value | None) -> np.ndarray:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def _constant(graph: ir.Graph, array: np.ndarray, name: str) -> ir.Value:
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.tensor(array, name=name)
    made = ir.Value(name=name, type=ir.TensorType(tensor.dtype), const_value=tensor)
    made.shape = ir.Shape(tensor.shape.numpy())
    graph.register_initializer(made)
    return made


def _convolution(graph: ir.Graph, node: ir.Node) -> bool:
    """A weight that no integer kernel reads, as a product of constants."""
    weight = _weight(node.inputs[1])
    if weight is None or runs_on_codes(weight):
        return False
    result = weight.outputs[0]
    if result.dtype is not ir.DataType.FLOAT or result.shape is None:
        return False
    codes, scale, zero = [*weight.inputs, None][:3]
    assert codes is not None
    assert scale is not None
    axis = weight.attributes.get_int("axis", 1) % len(result.shape)
    by_axis = [1] * len(result.shape)
    by_axis[axis] = -1
    name = f"{result.name}/expanded"
    factor = _float32(graph, scale, by_axis)
    nodes = [ir.node("Cast", [codes], {"to": ir.DataType.FLOAT.value})]
    if zero is not None:
        nodes.append(ir.node("Sub", [nodes[-1].outputs[0], _float32(graph, zero, by_axis)]))
    nodes.append(ir.node("Mul", [nodes[-1].outputs[0], factor]))
    for index, made in enumerate(nodes):
        made.name = made.outputs[0].name = f"{name}{index}"
        made.outputs[0].type, made.outputs[0].shape = result.type, result.shape
    nodes[-1].metadata_props[EXPANDED_KEY] = "yes"
    graph.insert_before(weight, nodes)
    result.replace_all_uses_with(nodes[-1].outputs[0])
    graph.remove(weight, safe=True)
    return True


def _relu(node: ir.Node) -> bool:
    """``Relu`` from codes to codes; one behind a layer is implied by the codes after it."""
    readers = {use.node.op_type for use in node.outputs[0].uses()}
    if not is_coded(node.inputs[0]) or readers != {"QuantizeLinear"}:
        return False
    node.op_type = "LeakyRelu"
    node.attributes["alpha"] = ir.AttrFloat32("alpha", 0.0)
    return True


def _float32(graph: ir.Graph, value: ir.Value, shape: list[int] | None = None) -> ir.Value:
    """A small constant in float32, and in another shape."""
    assert value.const_value is not None
    if shape is None and value.dtype is ir.DataType.FLOAT:
        return value
    name = f"{value.name}/float32"
    if name not in graph.initializers:
        array = value.const_value.numpy().astype(np.float32)
        _constant(graph, array if shape is None else array.reshape(shape), name)
    return graph.initializers[name]


def _remove(*nodes: ir.Node) -> None:
    for node in nodes:
        if node.graph is not None and not any(v.uses() for v in node.outputs):
            node.graph.remove(node, safe=True)


def expanded_bytes(model: ir.Model) -> int:
    """Bytes of the largest float weight that is made of codes when the model is loaded."""
    made = [node.outputs[0] for node in model.graph if EXPANDED_KEY in node.metadata_props]
    return max((4 * int(np.prod(v.shape.numpy())) for v in made if v.shape is not None), default=0)


__all__ = ["EXPANDED_KEY", "expanded_bytes", "fuse_static", "is_coded", "runs_on_codes"]
