"""The toolkit itself, where it is installed or can be (``hal targets setup rk3588``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import hal
from hal.conformance import model_cases
from hal.errors import TargetError
from hal.targets import load_backend, resolve
from tests.passes.toys import Toy

pytestmark = pytest.mark.slow
CASES = {case.name: case for case in model_cases()}


@pytest.fixture(scope="module", autouse=True)
def toolkit() -> None:
    found = resolve("rk3588")
    try:
        load_backend(found.backend).setup(found.descriptor, print)
    except TargetError as error:
        pytest.skip(f"rknn-toolkit2 cannot be installed here: {error.message}")


def built(name: str, folder: Path) -> tuple[hal.Bundle, bytes, dict[str, Any]]:
    """A small model's bundle, the only program in it, and what is recorded of that."""
    case = CASES[name]
    model = case.write(folder)
    bundle = hal.compile(model, target="rk3588", output=folder / f"{name}.hal", **case.options)
    (build,) = bundle.manifest.builds.values()
    (segment,) = build.segments
    record = dict(segment["record"])
    program = bytes(bundle.files.mapped(f"{segment['folder']}/{record['program']}"))
    return bundle, program, record


def test_a_network_becomes_one_program_in_float16(tmp_path: Path) -> None:
    bundle, program, record = built("cnn", tmp_path)
    assert program.startswith(b"RKNN")
    assert set(record["layer_dtypes"]) == {"float16"}
    # What is left on the processor changes a shape and computes nothing.
    assert set(record["layers_on_processor"]) <= {"Reshape"}
    x = np.random.default_rng(3).standard_normal((1, 3, 32, 32)).astype(np.float32)
    result = np.asarray(bundle.session()(x))
    # The simulator gives what the NPU can: numbers that float16 holds.
    np.testing.assert_array_equal(result, result.astype(np.float16).astype(np.float32))


def test_a_quantized_network_is_computed_in_int8(tmp_path: Path) -> None:
    """With hal's own scales; the last product, which hal leaves in float, is one in float16."""
    bundle, program, record = built("cnn-int8", tmp_path)
    assert program.startswith(b"RKNN")
    (build,) = bundle.manifest.builds.values()
    assert set(build.placement["assigned"]) == {"rknn"}
    assert set(record["layer_dtypes"]) == {"int8", "float16"}
    assert record["layer_dtypes"]["int8"] > record["layer_dtypes"]["float16"]


def test_what_the_npu_lacks_is_left_to_the_host_with_the_reason(tmp_path: Path) -> None:
    toy = Toy(x=[2, 64])
    toy.output(toy("Relu", toy("Erf", toy("MatMul", toy.x, np.eye(64, dtype=np.float32)))), "y")
    ir.save(toy.graph().model, tmp_path / "m.onnx")
    bundle = hal.compile(tmp_path / "m.onnx", target="rk3588", output=tmp_path / "m.hal")
    (build,) = bundle.manifest.builds.values()
    assert build.placement["assigned"] == {"rknn": 2, "onnxruntime": 1}
    assert "runs Erf on the processor" in build.placement["refused"][0]["reason"]
