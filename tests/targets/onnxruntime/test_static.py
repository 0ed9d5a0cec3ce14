"""Static activations: which kernels the runtime ends with, and that they mean the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from hal.ir import Graph
from hal.ir.evaluate import evaluate
from hal.passes.base import Pipeline
from hal.passes.quantize import Calibration, Quantize, parse_recipe
from hal.targets.onnxruntime.static import expanded_bytes
from tests.passes.quantize.cnn import calibration, images, network
from tests.passes.toys import Toy
from tests.targets.onnxruntime.support import build, load


def quantized(graph: Graph, recipe: str, data: Calibration | None = None) -> Graph:
    step = Quantize(parse_recipe(recipe), calibration=data)
    return Pipeline("test", (step,)).run(graph)[0]


def kernels(graph: Graph, folder: Path) -> Counter[str]:
    """Ops of the built model after the runtime's own optimization."""
    build(graph, folder)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder)
    )
    ort.InferenceSession((folder / "builds" / "model.onnx").read_bytes(), options)
    return Counter(
        node.op_type
        for node in onnx.load(folder / "optimized.onnx", load_external_data=False).graph.node
    )


def error(graph: Graph, folder: Path, given: dict[str, np.ndarray]) -> float:
    right = evaluate(graph, given)["y"]
    found = load(build(graph, folder), folder).run(given)["y"]
    return float(np.abs(found - right).max() / np.abs(right).max())


def test_a_network_runs_on_integers_from_end_to_end(tmp_path: Path) -> None:
    changed = quantized(network(), "w8a8", calibration())
    found = kernels(changed, tmp_path)
    assert found["QLinearConv"] == 8
    assert found["QLinearAdd"] == found["QLinearConcat"] == 1
    assert found["QLinearGlobalAveragePool"] == 1
    assert found["QuantizeLinear"] == found["DequantizeLinear"] == 1
    assert not {"Conv", "FusedConv", "Relu", "Clip"} & set(found)
    assert build(changed, tmp_path)["notes"] == []
    assert error(changed, tmp_path, {"x": images(8, seed=1)}) < 0.05


def test_products_read_codes_across(tmp_path: Path) -> None:
    toy = Toy(x=["n", 64])
    hidden = toy("Relu", toy("Add", toy("MatMul", toy.x, toy.weight(64, 96)), toy.weight(96)))
    toy.output(toy("MatMul", hidden, toy("Transpose", toy.weight(80, 96), perm=[1, 0])), "y")
    x = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    changed = quantized(toy.graph(), "w8a8-static", Calibration([{"x": x}]))
    found = kernels(changed, tmp_path)
    integer = {"MatMulIntegerToFloat", "QLinearMatMul", "QGemm"}
    assert sum(found[name] for name in integer) == 2
    assert found["MatMul"] == found["Transpose"] == found["MatMulNBits"] == 0
    assert build(changed, tmp_path)["notes"] == []
    assert error(changed, tmp_path, {"x": x}) < 0.02


def test_an_activation_function_of_its_own_has_an_integer_kernel(tmp_path: Path) -> None:
    toy = Toy(x=["n", 3, 16, 16])
    first = toy("Conv", toy.x, toy.weight(3, 3, 1, 1))
    second = toy("Conv", toy("Relu", first), toy.weight(3, 3, 1, 1))
    toy.output(toy("Conv", toy("Add", second, first), toy.weight(3, 3, 1, 1)), "y")
    changed = quantized(toy.graph(), "w8a8", calibration())
    found = kernels(changed, tmp_path)
    assert found["QLinearLeakyRelu"] == found["QLinearAdd"] == 1
    assert found["QLinearConv"] == 3
    assert error(changed, tmp_path, {"x": images(8, seed=1)}) < 0.05


def test_codes_go_through_pools_and_to_the_nearest_neighbours(tmp_path: Path) -> None:
    toy = Toy(x=["n", 3, 16, 16])
    first = toy("Conv", toy.x, toy.weight(8, 3, 1, 1))
    pooled = toy("AveragePool", first, kernel_shape=[2, 2], strides=[2, 2])
    scales = np.array([1, 1, 2, 2], np.float32)
    wide = toy("Resize", pooled, None, scales, mode="nearest")
    smooth = toy("Resize", toy("Conv", wide, toy.weight(8, 8, 1, 1)), None, scales, mode="linear")
    toy.output(toy("Conv", smooth, toy.weight(8, 8, 1, 1)), "y")
    changed = quantized(toy.graph(), "w8a8", calibration())
    found = kernels(changed, tmp_path)
    assert found["QLinearAveragePool"] == 1
    assert found["QLinearConv"] == 3
    assert found["Resize"] == 2
    assert found["QuantizeLinear"] == found["DequantizeLinear"] == 2  # around the linear one
    assert error(changed, tmp_path, {"x": images(8, seed=1)}) < 0.05


@pytest.mark.parametrize("recipe", ["w8a16", "w8a16,conv=w4a16", "w8a16,conv=w4a16-asym"])
def test_weights_alone_become_floats_when_the_model_is_loaded(tmp_path: Path, recipe: str) -> None:
    toy = Toy(x=["n", 16, 8, 8])
    toy.output(toy("Conv", toy.x, toy.weight(48, 16, 3, 3)), "y")
    changed = quantized(toy.graph(), recipe)
    record = build(changed, tmp_path)
    assert "expanded to floats when the model is loaded" in record["notes"][0]
    assert record["fold_bytes"] == 48 * 16 * 9 * 4
    assert set(kernels(changed, tmp_path)) <= {"Conv", "FusedConv", "ReorderInput", "ReorderOutput"}
    x = np.random.default_rng(0).standard_normal((2, 16, 8, 8)).astype(np.float32)
    assert error(changed, tmp_path, {"x": x}) < 1e-5


def test_transposed_convolutions_compute_on_floats(tmp_path: Path) -> None:
    toy = Toy(x=["n", 4, 8, 8])
    toy.output(toy("ConvTranspose", toy.x, toy.weight(4, 48, 3, 3), toy.weight(48)), "y")
    x = np.random.default_rng(0).random((8, 4, 8, 8), np.float32)
    changed = quantized(toy.graph(), "w8a8", Calibration([{"x": x}]))
    assert error(changed, tmp_path, {"x": x}) < 0.02
    assert "expanded" in build(changed, tmp_path)["notes"][0]


def test_a_model_without_codes_folds_nothing() -> None:
    assert expanded_bytes(network().model) == 0
