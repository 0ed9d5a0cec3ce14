from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from hal.ir import OPSET
from hal.ir.evaluate import evaluate
from hal.ir.graph import Graph
from hal.ir.small_floats import restate_small_floats


def graph() -> tuple[Graph, np.ndarray]:
    """A table of MXFP4, and the float32 matrix that it stands for."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (4, 64)).astype(np.uint8).view(ml_dtypes.float4_e2m1fn)
    scale = np.exp2(rng.integers(-20, 10, (4, 2))).astype(ml_dtypes.float8_e8m0fnu)
    values = []
    for name, array in (("codes", codes), ("scale", scale)):
        tensor = ir.tensor(array, name=name)
        values.append(ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype)))
        values[-1].shape = ir.Shape(array.shape)
    node = ir.node(
        "DequantizeLinear",
        values,
        {"axis": 1, "block_size": 32, "output_dtype": ir.DataType.FLOAT.value},
    )
    result = node.outputs[0]
    result.name, result.type, result.shape = (
        "w",
        ir.TensorType(ir.DataType.FLOAT),
        ir.Shape([4, 64]),
    )
    made = ir.Graph(
        [], [result], nodes=[node], initializers=values, opset_imports={"": OPSET}, name="table"
    )
    wanted = codes.astype(np.float32) * np.repeat(scale.astype(np.float32), 32, axis=1)
    return Graph(ir.Model(made, ir_version=11)), wanted


def test_restated_codes_are_integers_and_mean_the_same() -> None:
    made, wanted = graph()
    assert restate_small_floats(made.graph)
    assert {v.dtype for v in made.graph.initializers.values()} == {
        ir.DataType.INT8,
        ir.DataType.FLOAT,
    }
    np.testing.assert_array_equal(evaluate(made, {})["w"], wanted)
    assert not restate_small_floats(made.graph)


def test_the_reference_evaluator_runs_floats_of_four_bits_as_they_are_stored() -> None:
    made, wanted = graph()
    np.testing.assert_array_equal(evaluate(made, {})["w"], wanted)


@pytest.mark.parametrize("change", ["codes are an input", "dtype follows from the scale"])
def test_what_is_no_constant_of_known_dtype_stays(change: str) -> None:
    made, _ = graph()
    (node,) = made.graph
    if change == "codes are an input":
        made.graph.inputs.append(made.graph.initializers.pop("codes"))
    else:
        node.attributes.pop("output_dtype")
    assert not restate_small_floats(made.graph)
