"""Programs without a runtime give what the reference gives."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("tvm")

import hal
from hal.errors import DescriptorError, InputError, TargetError, UnsupportedError
from hal.targets import Registry, check_routes
from tests.passes.toys import Toy

DESCRIPTOR = """
schema = 1
name = "board"
extends = "cpu"
[routes.c]
backend = "aot"
{route}
"""
ROUTE = 'target = { kind = "llvm" }\ncompile = ["cc", "-O1"]\n'

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


def board(folder: Path, route: str = ROUTE) -> str:
    file = folder / "board.toml"
    file.write_text(DESCRIPTOR.format(route=route))
    return f"{file}:c"


def network(folder: Path, rows: int | str = 2) -> Path:
    """Convolution, a residual, a pool, a product, a softmax; two outputs of two dtypes."""
    toy = Toy(x=[rows, 3, 8, 8])
    first = toy("Relu", toy("Conv", toy.x, toy.weight(4, 3, 3, 3), pads=[1, 1, 1, 1]))
    second = toy("Conv", first, toy.weight(4, 4, 3, 3), pads=[1, 1, 1, 1])
    pooled = toy("GlobalAveragePool", toy("Add", first, second))
    flat = toy("Flatten", pooled)
    scores = toy("Softmax", toy("MatMul", flat, toy.weight(4, 5)), axis=-1)
    toy.output(scores, "scores")
    best = toy("ArgMax", scores, axis=1, keepdims=0)
    best.type = ir.TensorType(ir.DataType.INT64)
    toy.output(best, "best")
    ir.save(toy.graph().model, folder / "model.onnx")
    return folder / "model.onnx"


def test_a_program_gives_what_the_reference_gives(tmp_path: Path) -> None:
    bundle = hal.compile(network(tmp_path), target=[board(tmp_path), "host:onnxruntime"])
    record = next(r for n, r in bundle.manifest.builds.items() if n.startswith("board"))
    assert record.placement["assigned"] == {"aot": record.placement["nodes"]}
    rng = np.random.default_rng(0)
    with bundle.session(record.target) as one, bundle.session("host:onnxruntime") as other:
        for _ in range(3):
            x = rng.standard_normal((2, 3, 8, 8)).astype(np.float32)
            found, expected = one.run({"x": x}), other.run({"x": x})
            np.testing.assert_allclose(found["scores"], expected["scores"], atol=1e-6)
            np.testing.assert_array_equal(found["best"], expected["best"])
            assert found["best"].dtype == np.int64
        with pytest.raises(InputError, match="'x'"):
            one.run({"x": x[:1]})


def test_memory_is_shared_by_what_is_not_needed_together(tmp_path: Path) -> None:
    toy = Toy(x=[1, 64])
    stream = toy.x
    for _ in range(6):
        stream = toy("Tanh", toy("MatMul", stream, toy.weight(64, 64)))
    toy.output(stream, "y")
    ir.save(toy.graph().model, tmp_path / "chain.onnx")
    bundle = hal.compile(tmp_path / "chain.onnx", target=board(tmp_path))
    record = next(iter(bundle.manifest.builds.values())).segments[0]["record"]
    assert record["arena_bytes"] <= 3 * 64 * 4
    assert record["weight_bytes"] == 6 * 64 * 64 * 4


def test_dynamic_dims_are_asked_for_by_name(tmp_path: Path) -> None:
    path = network(tmp_path, "batch")
    with pytest.raises(UnsupportedError, match=r"static shapes only.*'batch'") as caught:
        hal.compile(path, target=board(tmp_path))
    assert "--dim batch=1" in caught.value.hint
    bundle = hal.compile(path, target=board(tmp_path), dims={"batch": 1})
    assert bundle.session().run({"x": np.zeros((1, 3, 8, 8), np.float32)})["best"].shape == (1,)


@pytest.mark.parametrize(
    ("route", "words"),
    [
        ('compile = ["cc"]', "target: Field required"),
        ('target = { kind = "llvm" }', "compile: Field required"),
        ('target = { kind = "cuda" }\ncompile = ["cc"]', "target: .*the kind is not 'llvm'"),
        (ROUTE + "speed = 1", "speed: Extra inputs"),
    ],
)
def test_a_wrong_route_is_told(tmp_path: Path, route: str, words: str) -> None:
    file = Path(board(tmp_path, route).removesuffix(":c"))
    with pytest.raises(DescriptorError, match=words):
        check_routes(Registry.discover("").from_file(file), str(file))


@pytest.mark.parametrize(
    ("route", "words"),
    [
        (ROUTE.replace('"cc"', '"no-such-compiler"'), "compiler of 'board' cannot run"),
        (ROUTE.replace('"-O1"', '"--no-such-option"'), "compiler of 'board' failed"),
        (ROUTE + 'run = ["no-such-emulator", "{program}"]', "cannot start"),
        (ROUTE + 'run = ["false"]', "died during 'run'"),
        (ROUTE + 'run = ["sh", "-c", "sleep 100"]\nseconds = 0.5', "did not finish 'run' in 0.5 s"),
    ],
)
def test_tools_that_fail_are_told(tmp_path: Path, route: str, words: str) -> None:
    with pytest.raises(TargetError, match=words):
        hal.compile(network(tmp_path), target=board(tmp_path, route))
