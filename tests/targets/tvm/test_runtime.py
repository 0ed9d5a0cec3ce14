"""A process that only runs a build: what it imports, and how it says that inputs do not fit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

pytest.importorskip("tvm")

import hal
from hal.targets.tvm import runtime
from tests.graphs import mlp

_RUN = """
import sys
import numpy as np
import hal

session = hal.load(sys.argv[1]).session("host:tvm")
x = np.ones((3, 32), np.float32)
print(float(session.run({"x": x})["y"].sum()))
heavy = {"onnx", "onnx_ir", "onnxruntime", "networkx", "sympy", "torch", "tvm"}
print(sorted(heavy & set(sys.modules)))
try:
    session.run({"x": np.ones((3, 31), np.float32)})
except hal.InputError as error:
    print(error.message)
import tvm, torch  # and both can still be had

print(tvm.runtime.tensor(x).numpy().sum(), float(torch.ones(2).sum()))
"""


def test_it_imports_neither_a_library_of_graphs_nor_a_compiler(tmp_path: Path) -> None:
    onnx.save(ir.to_proto(mlp().model), tmp_path / "mlp.onnx")
    bundle = hal.compile(tmp_path / "mlp.onnx", target="host:tvm", output=tmp_path / "mlp.hal")
    expected = bundle.session("host:tvm").run({"x": np.ones((3, 32), np.float32)})["y"].sum()
    done = subprocess.run(
        [sys.executable, "-c", _RUN, str(tmp_path / "mlp.hal")],
        capture_output=True,
        text=True,
        check=True,
    )
    total, modules, refused, *rest = done.stdout.splitlines()
    assert float(total) == pytest.approx(float(expected))
    assert modules == "[]"
    assert "x" in refused
    assert rest == ["96.0 2.0"]


@pytest.mark.parametrize("dtype", ["float32", "int64", "bool", "float16", "uint8"])
def test_tensors_keep_what_they_are_given(dtype: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtype)
    np.testing.assert_array_equal(runtime.to_numpy(runtime.tensor(array)), array)
    np.testing.assert_array_equal(runtime.to_numpy(runtime.tensor(array.T)), array.T)


def test_a_tensor_is_filled_again() -> None:
    tensor = runtime.tensor(np.zeros((2, 3), np.int32))
    array = np.arange(6, dtype=np.int32).reshape(3, 2).T
    runtime.fill(tensor, array)
    np.testing.assert_array_equal(runtime.to_numpy(tensor), array)
