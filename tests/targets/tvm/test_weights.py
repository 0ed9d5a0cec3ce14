"""Weights are mapped, not copied, where they are aligned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("tvm")

from hal.targets.backend import WeightStore
from hal.targets.tvm.weights import load_weights, record_weights, shared_tensor


class _Folder(WeightStore):
    def __init__(self, root: Path) -> None:
        self.root = root

    def locate(self, relative: str) -> tuple[Path, int, int]:
        path = self.root / relative
        return path, 0, path.stat().st_size

    def mapped(self, relative: str) -> memoryview:
        return memoryview(np.memmap(self.root / relative, np.uint8, "r"))

    def extracted(self, relative: str) -> Path:
        return self.root / relative


def _value(name: str, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
    return ir.Value(name=name, const_value=ir.Tensor(array, dtype=dtype, name=name))


def test_tensors_in_memory_are_written_to_the_build_and_read_back(tmp_path: Path) -> None:
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    b = np.arange(5, dtype=np.int64)
    (tmp_path / "build").mkdir()
    weights = record_weights([_value("a", a), _value("b", b)], tmp_path / "build")
    assert [w.offset for w in weights] == [0, 64]
    tensors, _alive = load_weights(weights, _Folder(tmp_path), "build")
    np.testing.assert_array_equal(tensors[0].numpy(), a)
    np.testing.assert_array_equal(tensors[1].numpy(), b)


def test_four_bit_weights_are_unpacked_with_their_sign(tmp_path: Path) -> None:
    import ml_dtypes

    values = np.array([[-8, 7, 0], [1, -1, 3]])
    value = _value("w", values.astype(ml_dtypes.int4), ir.DataType.INT4)
    tensors, _alive = load_weights(record_weights([value], tmp_path), _Folder(tmp_path), ".")
    np.testing.assert_array_equal(tensors[0].numpy(), values)


def test_an_aligned_read_only_array_is_shared() -> None:
    buffer = np.zeros(256 + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    raw = buffer[start : start + 256]
    tensor = shared_tensor(raw, "float32", (64,))
    raw.view(np.float32)[3] = 5.0
    assert tensor.numpy()[3] == 5.0
