from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from hal import InputError
from hal.ir import Graph
from hal.ir.evaluate import evaluate
from hal.passes.base import Pipeline
from hal.passes.quantize import METADATA_KEY, Calibration, Quantize, find_layers, parse_recipe
from hal.passes.quantize.chains import find_chains
from hal.passes.quantize.static import Kernels, apply, measure, pools_of_means
from tests.passes.quantize.cnn import calibration, images, network
from tests.passes.toys import Toy


def quantized(
    graph: Graph, recipe: str, data: Calibration | None = None, kernels: Kernels | None = None
) -> Graph:
    step = Quantize(parse_recipe(recipe), calibration=data, kernels=kernels or Kernels())
    return Pipeline("test", (step,)).run(graph)[0]


def signal_to_noise(graph: Graph, changed: Graph, given: dict[str, np.ndarray]) -> float:
    right, found = evaluate(graph, given), evaluate(changed, given)
    name = next(iter(right))
    noise = np.square(right[name] - found[name]).sum()
    return float(10 * np.log10(np.square(right[name]).sum() / noise))


def ops(graph: Graph) -> Counter[str]:
    return Counter(node.op_type for node in graph.graph)


def with_weight(graph: Graph, name: str, change: object) -> None:
    value = graph.graph.initializers[name]
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    value.const_value = ir.tensor(change(array), name=name)  # type: ignore[operator]


@pytest.mark.parametrize("activations", ["uint8", "int8"])
def test_everything_between_convolutions_is_coded(activations: str) -> None:
    graph = network()
    changed = quantized(graph, "w8a8", calibration(), Kernels(activations))
    facts = changed.metadata[METADATA_KEY]["static"]
    assert facts["dtype"] == activations
    assert facts["integer_ops"] == {"MaxPool": 1, "Add": 1, "Concat": 1, "GlobalAveragePool": 1}
    assert facts["float_ops"] == {}
    assert sum(facts["ranges"].values()) == facts["tensors"]
    test = {"x": images(8, seed=1)}
    assert signal_to_noise(graph, changed, test) > 28


def test_weights_are_signed_by_output_channel_and_biases_have_the_scale_of_their_products() -> None:
    changed = quantized(network(), "w8a8", calibration())
    for node in changed.graph:
        if node.op_type != "Conv":
            continue
        x, weight, bias = (value.producer() for value in node.inputs)  # type: ignore[union-attr]
        assert weight.inputs[0].dtype == ir.DataType.INT8
        assert weight.attributes.get_int("axis", 1) == 0
        assert bias.inputs[0].dtype == ir.DataType.INT32
        scale = x.inputs[1].const_value.numpy() * weight.inputs[1].const_value.numpy()
        np.testing.assert_allclose(bias.inputs[1].const_value.numpy(), scale, rtol=1e-6)


def test_elements_that_are_only_moved_share_their_codes() -> None:
    changed = quantized(network(), "w8a8", calibration())
    pool = next(node for node in changed.graph if node.op_type == "MaxPool")
    before = pool.inputs[0].producer()  # type: ignore[union-attr]
    after = next(iter(pool.outputs[0].uses())).node
    parameters = [[v.const_value.numpy().item() for v in n.inputs[1:]] for n in (before, after)]
    assert parameters[0] == parameters[1]


def test_arithmetic_that_leads_to_no_layer_stays_in_floats() -> None:
    toy = Toy(x=["n", 4, 8, 8])
    boxes = toy("Conv", toy.x, toy.weight(4, 4, 3, 3))
    toy.output(toy("Add", boxes, toy("Mul", boxes, boxes)), "boxes")
    graph = toy.graph()
    chains = find_chains(graph, find_layers(graph))
    assert chains.between == ()
    assert [value.name for value in chains.coded] == ["x", boxes.name]


def test_a_result_that_is_a_convolution_keeps_its_name() -> None:
    toy = Toy(x=["n", 4, 8, 8])
    toy.output(toy("Conv", toy.x, toy.weight(40, 4, 3, 3)), "result")
    graph = toy.graph()
    x = images(8, 8)
    x = np.concatenate([x, x[:, :1]], 1)
    changed = quantized(graph, "w8a8", Calibration([{"x": x}]))
    assert [value.name for value in changed.graph.outputs] == ["result"]
    assert signal_to_noise(graph, changed, {"x": x}) > 30


def test_the_mean_of_every_output_channel_stays_where_it_was() -> None:
    rng = np.random.default_rng(3)
    toy = Toy(x=["n", 3, 16, 16])
    weight = toy.constant(rng.standard_normal((16, 3, 1, 1)).astype(np.float32))
    toy.output(toy("Conv", toy.x, weight), "y")
    graph, data = toy.graph(), calibration()
    layers = find_layers(graph)
    measured = measure(graph, layers, data, Kernels(highest=7))  # few codes, so errors are large
    unmoved = {
        name: dataclasses.replace(shift, mean=tuple(0 * mean for mean in shift.mean))
        for name, shift in measured.shifts.items()
    }
    right = evaluate(graph, {"x": images()})["y"]
    moved = []
    for shifts in (measured.shifts, unmoved):
        changed = graph.clone()
        apply(
            changed,
            find_layers(changed),
            dataclasses.replace(measured, shifts=shifts),
            Kernels(highest=7),
        )
        found = evaluate(changed, {"x": images()})["y"]
        moved.append(np.abs((found - right).mean((0, 2, 3))).max())
    assert moved[0] < 0.2 * moved[1]


def test_a_channel_without_weights_keeps_a_large_bias() -> None:
    graph = network()
    name = next(layer.weight.name or "" for layer in find_layers(graph) if layer.kind == "conv")
    with_weight(graph, name, lambda array: array * (np.arange(16) > 0)[:, None, None, None])
    changed = quantized(graph, "w8a8", calibration())
    assert signal_to_noise(graph, changed, {"x": images(8, seed=1)}) > 25


def test_where_sums_saturate_weights_keep_to_seven_bits() -> None:
    changed = quantized(network(), "w8a8", calibration(), Kernels(highest=63))
    for value in changed.graph.initializers.values():
        if value.dtype == ir.DataType.INT8 and value.const_value.size > 10:  # type: ignore[union-attr]
            assert np.abs(value.const_value.numpy().astype(int)).max() <= 63  # type: ignore[union-attr]


def test_layers_that_share_a_weight_have_a_bias_each() -> None:
    toy = Toy(x=["n", 3, 16, 16])
    weight, bias = toy.weight(3, 3, 3, 3), toy.weight(3)
    first = toy("Conv", toy.x, weight, bias, pads=[1, 1, 1, 1])
    toy.output(toy("Conv", first, weight, bias, pads=[1, 1, 1, 1]), "y")
    graph = toy.graph()
    changed = quantized(graph, "w8a8", calibration())
    assert sum(v.dtype == ir.DataType.INT32 for v in changed.graph.initializers.values()) == 2
    assert signal_to_noise(graph, changed, {"x": images(8, seed=1)}) > 28


@pytest.mark.parametrize("group", [1, 2])
def test_transposed_convolutions_have_scales_along_their_second_axis(group: int) -> None:
    toy = Toy(x=["n", 4, 8, 8])
    weight = toy.weight(4, 6, 3, 3)
    made = toy("ConvTranspose", toy.x, weight, toy.weight(6 * group), group=group)
    toy.output(made, "y")
    graph = toy.graph()
    x = np.random.default_rng(0).random((8, 4, 8, 8), np.float32)
    changed = quantized(graph, "w8a8", Calibration([{"x": x}]))
    assert signal_to_noise(graph, changed, {"x": x}) > 30


def test_products_get_static_codes_where_the_recipe_says_so() -> None:
    toy = Toy(x=["n", 5, 64])
    hidden = toy("Relu", toy("Add", toy("MatMul", toy.x, toy.weight(64, 96)), toy.weight(96)))
    turned = toy("Transpose", toy.weight(80, 96), perm=[1, 0])
    toy.output(toy("MatMul", hidden, turned), "y")
    graph = toy.graph()
    x = np.random.default_rng(0).standard_normal((8, 5, 64)).astype(np.float32)
    changed = quantized(graph, "w8a8-static", Calibration([{"x": x}]))
    assert ops(changed)["QuantizeLinear"] == 2
    assert ops(changed)["RoundActivations"] == 0
    assert signal_to_noise(graph, changed, {"x": x}) > 30
    layers = changed.metadata[METADATA_KEY]["layers"]
    assert {layer["format"] for layer in layers} == {"w8a8-channel-static"}


def test_without_data_it_says_what_to_do() -> None:
    with pytest.raises(InputError, match="found on data, and none is given") as caught:
        quantized(network(), "w8a8")
    assert "conv=w8a16" in caught.value.hint
    assert ops(quantized(network(), "w8a8,conv=w8a16"))["QuantizeLinear"] == 0


@pytest.mark.parametrize(
    ("recipe", "dtype"), [("w8a16", "INT8"), ("w4a16", "INT8"), ("w8a16,conv=w4a16-asym", "UINT4")]
)
def test_weights_alone_are_stored_in_few_bits(recipe: str, dtype: str) -> None:
    toy = Toy(x=["n", 16, 8, 8])
    wide = toy("Conv", toy.x, toy.weight(48, 16, 3, 3))
    toy.output(toy("Conv", wide, toy.weight(4, 48, 1, 1)), "y")
    graph = toy.graph()
    changed = quantized(graph, recipe)
    reports = changed.metadata[METADATA_KEY]["layers"]
    assert [r["format"] for r in reports if r["format"] == "float"] == ["float"]
    assert "192 weights" in reports[1]["reason"]
    codes = [v for v in changed.graph.initializers.values() if "codes" in (v.name or "")]
    assert [v.dtype for v in codes] == [ir.DataType[dtype]]
    x = np.random.default_rng(0).random((2, 16, 8, 8), np.float32)
    assert signal_to_noise(graph, changed, {"x": x}) > (15 if "w4a16-asym" in recipe else 35)


def test_half_precision_gets_its_weights_rounded_and_says_why() -> None:
    toy = Toy()
    x = toy.add_input("x", ["n", 16, 8, 8], "FLOAT16")
    weight = toy.constant(np.random.default_rng(0).random((48, 16, 3, 3)).astype(np.float16))
    made = toy.output(toy("Conv", x, weight), "y")
    made.type = ir.TensorType(ir.DataType.FLOAT16)
    data = Calibration([{"x": np.ones((1, 16, 8, 8), np.float16)}])
    changed = quantized(toy.graph(), "w8a8", data)
    (report,) = changed.metadata[METADATA_KEY]["layers"]
    assert report["format"] == "w8a16-channel"
    assert "float32" in report["reason"]


@pytest.mark.parametrize("recipe", ["conv=w3a16", "conv=w4a8", "conv=ternary", "conv=fp8a16"])
def test_formats_that_convolutions_do_not_have_are_refused(recipe: str) -> None:
    with pytest.raises(InputError, match="convolutions cannot have"):
        parse_recipe(f"w8a16,{recipe}")


def test_static_goes_with_eight_bits() -> None:
    for text in ("w4a8-static", "w8a16-static", "w8a8-asym-static", "w8a8-static-g32"):
        with pytest.raises(InputError, match="static activations go with"):
            parse_recipe(text)


def test_means_over_all_places_become_pools_and_keep_their_names() -> None:
    graph = network()
    name = next(n.outputs[0].name for n in graph.graph if n.op_type == "ReduceMean")
    before = evaluate(graph, {"x": images(2)})["y"]
    assert pools_of_means(graph) == 1
    assert next(n for n in graph.graph if n.op_type == "GlobalAveragePool").outputs[0].name == name
    np.testing.assert_allclose(evaluate(graph, {"x": images(2)})["y"], before, atol=1e-5)
