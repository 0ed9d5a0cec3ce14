from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from hal import GraphError, InputError
from hal.ir.evaluate import Evaluator, evaluate
from hal.ir.ortvalue import from_ort, from_packed, to_ort
from tests.graphs import graph_of, mlp, value


def test_outputs_equal_numpy() -> None:
    graph = mlp()
    w1, w2 = (graph.graph.initializers[n].const_value.numpy() for n in ("w1", "w2"))  # type: ignore[union-attr]
    x = np.random.default_rng(1).standard_normal((3, 32), np.float32)
    assert np.allclose(evaluate(graph, {"x": x})["y"], np.maximum(x @ w1, 0) @ w2, atol=1e-5)


def test_any_value_can_be_asked_for() -> None:
    graph = mlp()
    x = np.ones((1, 32), np.float32)
    found = evaluate(graph, {"x": x}, ["relu_out", "first_out", "w1"])
    assert list(found) == ["relu_out", "first_out", "w1"]
    assert np.array_equal(found["relu_out"], np.maximum(found["first_out"], 0))
    assert [v.name for v in graph.graph.outputs] == ["y"]


def test_an_unknown_value_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(GraphError, match="no value 'relu_oot'") as caught:
        evaluate(mlp(), {"x": np.ones((1, 32), np.float32)}, ["relu_oot"])
    assert caught.value.hint == "did you mean 'relu_out'?"


def test_a_missing_input_is_named() -> None:
    with pytest.raises(InputError, match="input 'x' is missing"):
        evaluate(mlp(), {})


def test_an_evaluator_serves_many_calls_and_leaves_earlier_results_alone() -> None:
    graph = mlp()
    evaluator = Evaluator(graph)
    rng = np.random.default_rng(2)
    inputs = [rng.standard_normal((rows, 32), np.float32) for rows in (3, 3, 1)]
    found = [evaluator({"x": x})["y"] for x in inputs]
    for x, y in zip(inputs, found, strict=True):
        assert np.array_equal(y, evaluate(graph, {"x": x})["y"])
    with pytest.raises(InputError, match="input 'x' is missing"):
        evaluator({})


def test_what_onnxruntime_lacks_goes_through_the_reference_evaluator() -> None:
    import onnx_ir as ir

    x = value("x", ["n"], ir.DataType.DOUBLE)
    node = ir.node("Asin", [x])
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.DOUBLE)
    graph = graph_of([x], [node.outputs[0]], [node])
    assert evaluate(graph, {"x": np.array([0.5])})["y"] == pytest.approx(np.arcsin(0.5))


@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        "float16",
        "bfloat16",
        "int64",
        "uint8",
        "bool",
        "float8_e4m3fn",
        "int4",
        "uint4",
        "uint2",
    ],
)
def test_every_dtype_survives_the_way_into_the_runtime_and_back(dtype: str) -> None:
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    array = np.array([[0, 1, 1], [1, 0, 1]]).astype(kind)
    back = from_ort(to_ort(array))
    assert back.dtype == kind
    assert np.array_equal(back, array)


def test_negative_int4_survive() -> None:
    array = np.array([-8, -1, 0, 7, 3]).astype(ml_dtypes.int4)
    assert np.array_equal(from_ort(to_ort(array)), array)


def test_views_share_memory_with_the_runtime() -> None:
    array = np.zeros(8, np.float32)
    wrapped = to_ort(array)
    from_ort(wrapped)[3] = 5
    assert array[3] == 5


def test_strings_cannot_be_wrapped() -> None:
    with pytest.raises(TypeError, match="cannot be wrapped"):
        to_ort(np.array(["a"], object))


@pytest.mark.parametrize("dtype", [ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.UINT2])
def test_packed_codes_are_taken_where_they_are(dtype: ir.DataType) -> None:
    # An odd number of elements, in bytes that are followed by others.
    low, high = (-8, 8) if dtype is ir.DataType.INT4 else (0, 1 << dtype.bitwidth)
    codes = np.random.default_rng(0).integers(low, high, (5, 7)).astype(dtype.numpy())
    whole = np.frombuffer(ir.Tensor(codes, dtype).tobytes() + b"\xff" * 64, np.uint8)
    packed = whole[: -(-35 * dtype.bitwidth // 8)]
    value = from_packed(packed, dtype, (5, 7))
    assert value.data_ptr() == packed.ctypes.data
    np.testing.assert_array_equal(from_ort(value), codes)
