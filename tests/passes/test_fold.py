from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from hal.ir import Graph
from hal.passes import Fold, Pipeline
from tests.passes.toys import Toy, feeds, largest_difference, ops, same


def fold(graph: Graph, **options: int) -> Graph:
    return Pipeline("fold", (Fold(**options),)).run(graph)[0]


def test_a_constant_expression_becomes_one_constant():
    t = Toy(x=["n"])
    t.output(t("Add", t.x, t("Sqrt", t("Mul", 2.0, 8.0))))
    result = fold(t.graph())
    assert ops(result) == {"Add": 1}
    assert [v.const_value.numpy().item() for v in result.graph.initializers.values()] == [4.0]


def test_constant_nodes_become_initializers():
    t = Toy(x=["n"])
    t.output(t("Add", t.x, t("Constant", value_float=3.0)))
    result = fold(t.graph())
    assert ops(result) == {"Add": 1}
    assert len(result.graph.initializers) == 1


def test_a_reshape_to_computed_extents_gets_a_constant_target():
    t = Toy(x=["batch", "sequence", 64])
    batch = t("Shape", t.x, start=0, end=1)
    sequence = t("Shape", t.x, start=1, end=2)
    target = t("Concat", batch, sequence, np.array([-1]), np.array([16]), axis=0)
    t.output(t("Reshape", t.x, target))
    graph = t.graph()
    result = same(graph, Fold(), batch=2, sequence=3)
    assert ops(result) == {"Reshape": 1}
    (constant,) = result.graph.initializers.values()
    assert constant.const_value.numpy().tolist() == [0, 0, 4, 16]


def test_merged_extents_become_minus_one():
    t = Toy(x=["batch", "sequence", 8])
    shape = t("Shape", t.x)
    rows = t("Mul", t("Gather", shape, np.array(0)), t("Gather", shape, np.array(1)))
    target = t("Concat", t("Unsqueeze", rows, np.array([0])), np.array([8]), axis=0)
    t.output(t("Reshape", t.x, target))
    result = same(t.graph(), Fold(), batch=2, sequence=3)
    assert ops(result) == {"Reshape": 1}


def test_static_extents_fold_through_arithmetic():
    t = Toy(x=["batch", 6])
    half = t("Div", t("Shape", t.x, start=1, end=2), np.array([2]))
    t.output(t("Slice", t.x, np.array([0]), half, np.array([1])))
    result = same(t.graph(), Fold(), batch=3)
    assert ops(result) == {"Slice": 1}
    assert list(result.graph.outputs[0].shape) == ["batch", 3]


def test_a_large_transposed_weight_is_not_computed_until_it_is_read():
    reads = []

    def load() -> ir.TensorProtocol:
        reads.append(1)
        return ir.tensor(np.arange(512 * 256, dtype=np.float32).reshape(512, 256))

    t = Toy(x=["n", 256])
    weight = t.constant(np.zeros((512, 256), np.float32), "w")
    weight.const_value = ir.LazyTensor(load, dtype=ir.DataType.FLOAT, shape=ir.Shape([512, 256]))
    t.output(t("MatMul", t.x, t("Transpose", weight, perm=[1, 0])))
    result = fold(t.graph())
    assert ops(result) == {"MatMul": 1}
    assert not reads
    (folded,) = result.graph.initializers.values()
    assert folded.name == "w.transposed"
    assert list(folded.shape) == [256, 512]
    assert np.array_equal(folded.const_value.numpy(), load().numpy().T)


def test_chains_on_large_weights_stay_lazy_and_are_right():
    t = Toy(x=["n", 256])
    w = t.weight(256 * 512)
    matrix = t("Reshape", t("Mul", w, 0.5), np.array([512, 256]))
    t.output(t("MatMul", t.x, t("Transpose", matrix, perm=[1, 0])))
    graph = t.graph()
    result = fold(graph, small=64)
    assert ops(result) == {"MatMul": 1}
    assert all(isinstance(v.const_value, ir.LazyTensor) for v in result.graph.initializers.values())
    assert largest_difference(graph, result, feeds(graph, n=2)) < 1e-5


def test_a_constant_larger_than_its_inputs_is_not_made():
    t = Toy(x=[1])
    big = t("Expand", 1.0, np.array([1024, 1024]))
    t.output(t("Add", t.x, t("ReduceSum", big)))
    assert ops(fold(t.graph()))["Expand"] == 1


def test_random_and_quantization_ops_stay():
    t = Toy(x=["n", 4])
    noise = t("RandomNormalLike", np.zeros((4,), np.float32))
    weight = t("DequantizeLinear", np.ones((4,), np.int8), 0.5)
    t.output(t("Add", t("Add", t.x, noise), weight))
    assert ops(fold(t.graph()), "RandomNormalLike", "DequantizeLinear").total() == 2


def test_cast_like_becomes_a_cast():
    t = Toy(x=["n"])
    counts = t.add_input("counts", ["n"], "INT64")
    t.output(t("Add", t.x, t("CastLike", counts, t.x)))
    assert ops(fold(t.graph())) == {"Add": 1, "Cast": 1}


@pytest.mark.parametrize("length", [1, 5])
def test_extents_with_a_past_are_sums(length: int):
    t = Toy(past=["batch", "past", 4], new=["batch", "sequence", 4])
    t.output(t("Concat", t.past, t.new, axis=1))
    graph = t.graph()
    assert str(list(graph.graph.outputs[0].shape)[1]) == "past + sequence"
    same(graph, Fold(), batch=1, past=length, sequence=2)
