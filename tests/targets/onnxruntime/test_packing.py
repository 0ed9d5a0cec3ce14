from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from hal.ir import Graph
from hal.ir.weights import write_weights
from hal.targets.onnxruntime import packing
from hal.targets.onnxruntime.packing import repacks_at_load, token_input
from hal.targets.onnxruntime.session import NO_REPACKING
from tests.targets.onnxruntime.support import build, descriptor, load, parse

TOKENS = """g (int64[batch, sequence] ids) => (float[batch, sequence, 32] y) {
    x = Gather (e, ids) y = MatMul (x, w) }"""
RNG = np.random.default_rng(0)
TABLE = RNG.standard_normal((16, 64), dtype=np.float32)
WEIGHT = RNG.standard_normal((64, 32), dtype=np.float32)


def graph() -> Graph:
    return parse(TOKENS, e=TABLE, w=WEIGHT)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a bundle may lie; every model counts as large."""
    monkeypatch.setattr(packing, "_MAPPED_FROM", 0)
    return tmp_path


def mapped(folder: Path, **route: Any) -> Any:
    """An executable whose weights lie in a file that it maps."""
    made = graph()
    write_weights(made, folder)
    return load(build(made, folder), folder, descriptor(**route) if route else None)


def ids(rows: int) -> dict[str, np.ndarray]:
    return {"ids": np.arange(rows, dtype=np.int64)[:, None] % 16}


def test_large_float_models_stay_mapped() -> None:
    made = graph()
    assert repacks_at_load(made)
    large = ir.ExternalTensor(
        "w.bin", 0, 128 << 20, ir.DataType.FLOAT, shape=ir.Shape([1 << 20, 32]), name="w"
    )
    made.graph.initializers["w"].const_value = large
    assert not repacks_at_load(made)


def test_token_ids_are_integers_of_batch_and_sequence() -> None:
    assert token_input(graph()) == "ids"
    assert token_input(parse("g (float[n, 2] x) => (float[n, 2] y) { y = Exp (x) }")) == ""
    assert token_input(parse("g (int64[n] x) => (int64[n] y) { y = Abs (x) }")) == ""


def test_weights_are_repacked_once_calls_of_few_rows_are_common(folder: Path) -> None:
    executable = mapped(folder)
    first = executable.session
    for rows in (1, 100, *[3] * 7, 1, 100):
        executable.run(ids(rows))
    assert executable.session is first
    out = executable.run(ids(3))["y"]
    assert executable.session is not first
    assert np.allclose(out, TABLE[:3, None] @ WEIGHT, atol=1e-5)
    second = executable.session
    for _ in range(20):
        executable.run(ids(3))
    assert executable.session is second


def test_a_file_that_was_replaced_is_not_read_again(folder: Path) -> None:
    executable = mapped(folder)
    first, right = executable.session, executable.run(ids(3))["y"]
    (weights,) = folder.glob("*.safetensors")
    other = folder / "other"
    other.write_bytes(bytes(weights.stat().st_size))
    other.replace(weights)
    for _ in range(20):
        assert np.array_equal(executable.run(ids(3))["y"], right)
    assert executable.session is first


def test_a_session_goes_on_where_repacking_fails(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executable = mapped(folder)
    first = executable.session

    def fail(*arguments: Any, **options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("onnxruntime.InferenceSession", fail)
    for _ in range(20):
        executable.run(ids(3))
    assert executable.session is first


def test_a_route_may_refuse_repacking(folder: Path) -> None:
    executable = mapped(folder, session_options={NO_REPACKING: "1"})
    first = executable.session
    for _ in range(20):
        executable.run(ids(3))
    assert executable.session is first
