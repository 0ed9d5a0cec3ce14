"""What the vendor of the invented NPU runs: the contract, and what does not fit.

Whether what is claimed is right, the conformance says, which pytest collects beside these tests
(see pyproject.toml).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir import tape

import hal
from hal.conformance import model_cases, run_case
from hal.errors import UnsupportedError
from hal.targets import check_routes, list_backends, resolve

TARGET = "tiny-npu"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAL_CACHE", str(tmp_path / "cache"))


def test_the_descriptor_is_valid() -> None:
    check_routes(resolve(TARGET).descriptor, TARGET)


def test_the_backend_says_that_it_is_a_simulator() -> None:
    (mine,) = (b for b in list_backends() if b.name == "tiny_npu")
    assert mine.status == "simulator"


def test_an_8_bit_network_runs_on_the_chip() -> None:
    (case,) = (c for c in model_cases() if c.name == "cnn-int8")
    outcome = run_case(case, TARGET, fallback=True)
    assert outcome.status == "passed", outcome.reason
    assert outcome.share > 0.7


def test_a_float_network_is_refused_with_a_reason() -> None:
    (case,) = (c for c in model_cases() if c.name == "cnn")
    outcome = run_case(case, TARGET, fallback=False)
    assert outcome.status == "unsupported"
    assert "8-bit integers only" in outcome.reason


def test_what_does_not_fit_goes_to_the_host(tmp_path: Path) -> None:
    net, floats = tape.Tape(), ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", shape=ir.Shape([1, 512, 2, 2]), type=floats)
    rng = np.random.default_rng(0)
    outputs, weights = [], []
    for i, channels in enumerate((1024, 64)):
        array = rng.standard_normal((channels, 512, 1, 1)).astype(np.float32) * 0.05
        weight = ir.Value(name=f"w{i}", const_value=ir.tensor(array, name=f"w{i}"))
        weight.type, weight.shape = floats, ir.Shape(array.shape)
        output = net.op("Conv", [x, weight])
        output.name, output.type, output.shape = f"y{i}", floats, ir.Shape([1, channels, 2, 2])
        outputs.append(output)
        weights.append(weight)
    graph = ir.Graph(
        [x], outputs, nodes=list(net.nodes), initializers=weights, opset_imports={"": 21}
    )
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "wide.onnx")
    data = [{"x": rng.standard_normal((1, 512, 2, 2)).astype(np.float32)} for _ in range(4)]
    bundle = hal.compile(tmp_path / "wide.onnx", target=TARGET, quantize="w8a8", calibration=data)
    (record,) = bundle.manifest.builds.values()
    refused = {r["op"]: r for r in record.placement["refused"]}
    assert refused["Conv"]["count"] == 1
    assert "KiB, the chip has 256" in refused["Conv"]["reason"]


def test_shapes_must_be_static(tmp_path: Path) -> None:
    net = tape.Tape()
    x = ir.Value(name="x", shape=ir.Shape(["n", 4]), type=ir.TensorType(ir.DataType.FLOAT))
    y = net.op("Relu", [x])
    y.name, y.type, y.shape = "y", x.type, x.shape
    graph = ir.Graph([x], [y], nodes=list(net.nodes), opset_imports={"": 21})
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "m.onnx")
    with pytest.raises(UnsupportedError, match="static shapes"):
        hal.compile(tmp_path / "m.onnx", target=TARGET, fallback=False)
