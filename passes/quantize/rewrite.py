"""Put quantized weights into a graph: ``DequantizeLinear`` in the place of the initializer."""

from __future__ import annotations

import onnx_ir as ir

from hal.ir import HAL_DOMAIN, Graph
from hal.ir.quant_ops import ROUND_ACTIVATIONS, UNPACK_BITS
from hal.passes._edit import Editor, is_op
from hal.passes.quantize.codes import Codes, pack, pack_three_bits, stored_scale
from hal.passes.quantize.experts import is_down
from hal.passes.quantize.layers import Layer


def put(graph: Graph, layer: Layer, codes: Codes) -> None:
    """Replace ``layer``'s weight by ``codes`` ``[R, C]``, R being all axes but the last.

    Reads ``MatMul(x, Transpose(DequantizeLinear(codes, scale)))`` afterwards, of the last two axes
    where there is a matrix for each head. With activations of 8 bits, x goes through
    ``hal::RoundActivations``, which products of one x and the first matrices of experts share.
    """
    edit = Editor(graph)
    rounding = codes.format.activations == 8 and not codes.format.static
    rounded = readers_of_input(layer) if rounding else ()
    edit.at(min(layer.uses, key=lambda n: _position(graph, n)))
    weight = _dequantize(edit, layer, codes)
    for node in layer.uses:
        edit.at(node)
        for index, value in enumerate(list(node.inputs)):
            if value is layer.weight:
                node.replace_input_with(index, _across(edit, weight) if layer.across else weight)
    for node in rounded:
        _round_input(edit, node, codes.format.group)


def _position(graph: Graph, node: ir.Node) -> int:
    return next(i for i, n in enumerate(graph.nodes()) if n is node)


def _dequantize(edit: Editor, layer: Layer, codes: Codes) -> ir.Value:
    form, shape = codes.format, layer.shape
    base = (layer.weight.name or layer.name).removesuffix(".transposed")
    blocks = (*shape[:-1], codes.scale.shape[1])
    stored = _stored(edit, base, codes, shape)
    by_channel = form.group == 0 and len(shape) == 2
    scale_shape = (shape[0],) if by_channel else blocks
    inputs = [stored, edit.tensor(stored_scale(codes, scale_shape), f"{base}.scale")]
    if codes.zero is not None:
        inputs.append(edit.tensor(pack(codes.zero, form.dtype, scale_shape), f"{base}.zero"))
    dtype = layer.weight.dtype or ir.DataType.FLOAT
    attributes = {"output_dtype": dtype.value, "axis": 0 if by_channel else len(shape) - 1}
    if not by_channel:
        attributes["block_size"] = form.group or shape[-1]
    weight = edit.op("DequantizeLinear", inputs, attributes)
    weight.type, weight.shape = ir.TensorType(dtype), ir.Shape(shape)
    return weight


def exchange(layer: Layer, codes: Codes) -> None:
    """Put ``codes`` in the place of others of the same format that :func:`put` put there."""
    gather = next(node for node in layer.uses if is_op(node, "Gather"))
    weight = gather.inputs[0].producer() if gather.inputs[0] is not None else None
    assert weight is not None
    stored, scale, *zero = (value for value in weight.inputs if value is not None)
    unpack = stored.producer()
    if unpack is not None and unpack.inputs[0] is not None:
        stored = unpack.inputs[0]
    assert scale.const_value is not None
    shape = tuple(int(d) for d in scale.const_value.shape.numpy())
    _set(stored, _packed(codes, layer.shape))
    _set(scale, stored_scale(codes, shape))
    if codes.zero is not None:
        _set(zero[0], pack(codes.zero, codes.format.dtype, shape))


def _set(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    tensor.name = value.name
    value.const_value = tensor


def _packed(codes: Codes, shape: tuple[int, ...]) -> ir.TensorProtocol:
    if codes.format.bits != 3 or shape[-1] % 8:
        return pack(codes.codes, codes.format.dtype, shape)
    packed = pack_three_bits(codes.codes).reshape(*shape[:-1], shape[-1] * 3 // 8)
    return ir.Tensor(packed)


def _stored(edit: Editor, base: str, codes: Codes, shape: tuple[int, ...]) -> ir.Value:
    form = codes.format
    value = edit.tensor(_packed(codes, shape), f"{base}.codes")
    if form.bits != 3 or shape[-1] % 8:
        return value
    signed = int(form.symmetric)
    unpacked = edit.op(UNPACK_BITS, [value], {"bits": 3, "signed": signed}, domain=HAL_DOMAIN)
    unpacked.type, unpacked.shape = ir.TensorType(form.dtype), ir.Shape(shape)
    return unpacked


def _across(edit: Editor, weight: ir.Value) -> ir.Value:
    assert weight.shape is not None
    extents = list(weight.shape)
    order = [*range(len(extents) - 2), len(extents) - 1, len(extents) - 2]
    result = edit.op("Transpose", [weight], {"perm": order})
    result.type, result.shape = weight.type, ir.Shape([extents[axis] for axis in order])
    return result


def _round_input(edit: Editor, product: ir.Node, group: int) -> None:
    x = product.inputs[0]
    assert x is not None
    found = next(
        (
            use.node.outputs[0]
            for use in x.uses()
            if use.node.domain == HAL_DOMAIN
            and use.node.op_type == ROUND_ACTIVATIONS
            and use.node.attributes.get_int("block_size", 0) == group
        ),
        None,
    )
    if found is None:
        edit.at(_first_reader(x))
        found = edit.op(
            ROUND_ACTIVATIONS, [x], {"bits": 8, "block_size": group}, like=x, domain=HAL_DOMAIN
        )
    product.replace_input_with(0, found)


def _first_reader(value: ir.Value) -> ir.Node:
    readers = {use.node for use in value.uses()}
    graph = next(iter(readers)).graph
    assert graph is not None
    return next(node for node in graph if node in readers)


def rounds_activations(layer: Layer, group: int) -> bool:
    """Whether a layer's inputs can be rounded in blocks of ``group``."""
    return bool(readers_of_input(layer)) and (group == 0 or layer.shape[-1] % group == 0)


def readers_of_input(layer: Layer) -> tuple[ir.Node, ...]:
    """Nodes whose first input meets the weight and can be rounded: products, mixtures of experts.

    What the second matrices of experts meet is made inside of the mixture.
    """
    if layer.kind == "experts":
        return () if is_down(layer) else layer.uses
    return layer.products


__all__ = ["exchange", "put", "readers_of_input", "rounds_activations"]
