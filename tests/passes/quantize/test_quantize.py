from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from hal import InputError, ModelError
from hal.ir import Graph
from hal.ir.evaluate import evaluate
from hal.passes.base import Pipeline
from hal.passes.quantize import (
    METADATA_KEY,
    Calibration,
    Quantize,
    find_layers,
    parse_recipe,
    parse_setting,
)
from tests.passes.quantize.toy import language_model
from tests.passes.toys import Toy

IDS = {"ids": np.arange(40).reshape(2, 20) % 96}


def quantized(graph: Graph, recipe: str, **settings: str) -> Graph:
    chosen = {name: parse_setting(text) for name, text in settings.items()}
    return Pipeline("test", (Quantize(parse_recipe(recipe), chosen),)).run(graph)[0]


def distance(before: Graph, after: Graph) -> float:
    """Error of the result as a share of its size."""
    right, found = evaluate(before, IDS)["logits"], evaluate(after, IDS)["logits"]
    return float(np.linalg.norm(found - right) / np.linalg.norm(right))


def test_layers_have_a_kind_and_one_that_chooses_is_marked() -> None:
    found = {layer.name: layer for layer in find_layers(language_model())}
    kinds = {name: layer.kind for name, layer in found.items()}
    assert kinds == {
        "table": "embedding",
        "first": "linear",
        "second": "linear",
        "router": "linear",
        "head": "head",
    }
    assert [name for name, layer in found.items() if layer.routes] == ["router"]


@pytest.mark.parametrize(
    ("recipe", "worst"),
    [
        ("w8a16", 0.02), ("w8a8", 0.03), ("w8a16-channel", 0.03), ("w4a16", 0.15),
        ("w4a8-asym:hqq", 0.15), ("w3a16", 0.3), ("w3a16-asym", 0.3), ("w2a16", 0.7),
        ("ternary", 0.8), ("fp8", 0.05), ("fp8-channel:hqq", 0.06), ("mxfp4", 0.25),
        ("mxfp4a8:hqq", 0.25), ("w4a16,head=w4a16,embedding=w4a16", 0.2),
    ],
)  # fmt: skip
def test_every_format_runs_and_costs_what_its_bits_say(recipe: str, worst: float) -> None:
    graph = language_model()
    changed = quantized(graph, recipe)
    assert 0 < distance(graph, changed) < worst
    report = changed.metadata[METADATA_KEY]
    kept = [layer["name"] for layer in report["layers"] if layer["format"] == "float"]
    assert kept == ["router"]
    assert changed.weight_bytes() < graph.weight_bytes() / 2


def test_the_form_is_standard_onnx_and_opens_as_such() -> None:
    changed = quantized(language_model(), "w4a16")
    counts = Counter(node.op_type for node in changed.nodes())
    assert counts["DequantizeLinear"] == 4
    assert {n.domain for n in changed.nodes()} == {""}
    codes = changed.graph.initializers["first.weight.codes"]
    assert codes.dtype is ir.DataType.INT4
    assert list(codes.shape) == [128, 64]


def test_a_tied_table_is_stored_once_and_is_a_head() -> None:
    graph = language_model(tied=True)
    changed = quantized(graph, "w4a16")
    kinds = [layer["kind"] for layer in changed.metadata[METADATA_KEY]["layers"]]
    assert kinds.count("head") == 1
    assert "embedding" not in kinds
    assert sum(name.startswith("table") for name in changed.graph.initializers) == 2
    assert distance(graph, changed) < 0.15


def test_products_of_one_input_share_its_rounding() -> None:
    toy = Toy(x=["n", 64])
    for name in ("a", "b"):
        toy.output(toy("Relu", toy("MatMul", toy.x, toy.weight(64, 96))), name)
    changed = quantized(toy.graph(), "w8a8")
    assert Counter(n.op_type for n in changed.nodes())["RoundActivations"] == 1


def test_inputs_that_are_no_whole_blocks_keep_their_activations_and_it_is_said() -> None:
    toy = Toy(x=["n", 72])
    toy.output(toy("Relu", toy("MatMul", toy.x, toy.weight(72, 96))), "y")
    (layer,) = quantized(toy.graph(), "w8a8").metadata[METADATA_KEY]["layers"]
    assert layer["format"] == "w8a16-g32"
    assert "72" in layer["reason"]


def test_single_layers_may_have_settings_of_their_own() -> None:
    graph = language_model()
    changed = quantized(graph, "w4a16", first="w8a16", second="float")
    by_name = {x["name"]: x["format"] for x in changed.metadata[METADATA_KEY]["layers"]}
    assert by_name["first"] == "w8a16-g32"
    assert by_name["second"] == "float"


def test_a_layer_that_is_not_there_gets_a_suggestion() -> None:
    with pytest.raises(InputError, match="no layer 'frist'") as caught:
        quantized(language_model(), "w4a16", frist="w8a16")
    assert "first" in caught.value.hint


def test_a_model_without_weights_to_quantize_is_an_error() -> None:
    toy = Toy(x=["n", 8])
    toy.output(toy("Relu", toy.x), "y")
    with pytest.raises(InputError, match="no weights"):
        quantized(toy.graph(), "w4a16")


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_infinite_weights_are_named(value: float) -> None:
    graph = language_model()
    graph.graph.initializers["first.weight"].const_value.numpy()[3, 4] = value
    with pytest.raises(ModelError, match=r"first\.weight"):
        quantized(graph, "w4a16")


def test_methods_that_need_data_say_so() -> None:
    with pytest.raises(InputError, match="calibration"):
        quantized(language_model(), "w4a16:gptq")


def heads(of_input: int = 4) -> Graph:
    """A product with a matrix for each of four heads, of as many inputs or of one for all."""
    toy = Toy()
    x = toy.add_input("x", ["batch", of_input, "sequence", 96], "FLOAT")
    weight = toy.weight(4, 96, 48)
    weight.name = "maps"
    toy.output(toy("MatMul", x, weight), "y")
    return toy.graph()


def test_a_matrix_for_each_head_is_a_layer() -> None:
    (layer,) = find_layers(heads())
    assert (layer.name, layer.stacked, layer.shape) == ("maps", True, (4, 48, 96))
    assert layer.weight.const_value is not None
    stored = layer.weight.const_value.numpy()
    rows = layer.matrix(stored)
    np.testing.assert_array_equal(rows.reshape(4, 48, 96)[1, 2], stored[1, :, 2])
    np.testing.assert_array_equal(layer.stored(rows), stored)
    assert not find_layers(heads(of_input=1))  # they would share inputs


@pytest.mark.parametrize(
    ("recipe", "worst"), [("w8a8", 0.02), ("w4a16-channel", 0.2), ("w4a8", 0.15), ("w3a16", 0.3)]
)
def test_matrices_of_heads_have_every_format(recipe: str, worst: float) -> None:
    graph = heads()
    changed = quantized(graph, recipe)
    given = {"x": np.random.default_rng(0).standard_normal((2, 4, 5, 96)).astype(np.float32)}
    right, found = evaluate(graph, given)["y"], evaluate(changed, given)["y"]
    assert 0 < float(np.linalg.norm(found - right) / np.linalg.norm(right)) < worst


def test_methods_that_look_at_data_leave_matrices_of_heads_to_rounding() -> None:
    graph = heads()
    sample = np.random.default_rng(0).standard_normal((2, 4, 5, 96)).astype(np.float32)
    step = Quantize(parse_recipe("w4a16,head=w4a16:gptq"), calibration=Calibration([{"x": sample}]))
    changed = Pipeline("test", (step,)).run(graph)[0]
    (layer,) = changed.metadata[METADATA_KEY]["layers"]
    assert layer["method"] == "rtn"
    assert layer["reason"] == "a matrix for each head is rounded to nearest"


def test_below_four_bits_matrices_of_heads_have_eight_unless_a_plan_names_them() -> None:
    graph = heads()
    step = Quantize(parse_recipe("w2a16,head=w2a16"))
    (layer,) = Pipeline("test", (step,)).run(graph)[0].metadata[METADATA_KEY]["layers"]
    assert layer["format"] == "w8a16-g32"
    assert "for each head" in layer["reason"]
    step = Quantize(parse_recipe("w2a16"), {"maps": parse_setting("w2a16")})
    (layer,) = Pipeline("test", (step,)).run(graph)[0].metadata[METADATA_KEY]["layers"]
    assert layer["format"] == "w2a16-g32"
