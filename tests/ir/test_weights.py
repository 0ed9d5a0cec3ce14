"""hal.ir.weights: safetensors files that ONNX external data can point into."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from safetensors.numpy import load_file

from hal.ir import weights
from tests.graphs import mlp


def test_weights_are_plain_safetensors_and_the_graph_points_into_them(tmp_path: Path) -> None:
    graph = mlp(hidden=32)
    before = {n: v.const_value.numpy().copy() for n, v in graph.graph.initializers.items()}
    files = weights.write_weights(graph, tmp_path)
    assert [f.name for f in files] == ["weights-00001.safetensors"]
    loaded = load_file(files[0])
    for name, value in graph.graph.initializers.items():
        assert isinstance(value.const_value, ir.ExternalTensor)
        assert value.const_value.offset % weights.ALIGN == 0
        np.testing.assert_array_equal(value.const_value.numpy(), before[name])
        np.testing.assert_array_equal(loaded[name], before[name])


def test_one_tensor_under_two_names_is_written_once(tmp_path: Path) -> None:
    graph = mlp(hidden=32)
    values = list(graph.graph.initializers.values())
    values[1].const_value = values[0].const_value
    (path,) = weights.write_weights(graph, tmp_path)
    assert len(load_file(path)) == 1
    assert values[0].const_value.offset == values[1].const_value.offset


def test_sizes_that_break_alignment_go_last(tmp_path: Path) -> None:
    graph = mlp(hidden=32)
    odd = graph.graph.initializers["w1"]
    odd.const_value = ir.Tensor(np.ones((17, 33), np.float32), name="w1")
    weights.write_weights(graph, tmp_path)
    assert odd.const_value.offset > graph.graph.initializers["w2"].const_value.offset


def test_large_weights_are_split_into_shards(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(weights, "SHARD_BYTES", 5000)
    assert len(weights.write_weights(mlp(hidden=32), tmp_path)) == 2


def test_small_tensors_stay_in_the_graph(tmp_path: Path) -> None:
    assert weights.write_weights(mlp(hidden=4), tmp_path) == []


def test_packed_dtypes_are_carried_as_bytes(tmp_path: Path) -> None:
    graph = mlp(hidden=32)
    value = graph.graph.initializers["w1"]
    array = np.arange(64 * 64).reshape(64, 64) % 16 - 8
    packed = ir.Tensor(array.astype(ir.DataType.INT4.numpy()), dtype=ir.DataType.INT4, name="w1")
    value.const_value = packed
    weights.write_weights(graph, tmp_path)
    np.testing.assert_array_equal(value.const_value.numpy().astype(int), array)
