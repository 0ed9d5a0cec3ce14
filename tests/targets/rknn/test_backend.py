"""The route through rknn-toolkit2, with a stand-in for the toolkit in the worker's place."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import hal
from hal.errors import CheckFailed, DescriptorError, TargetError, UnsupportedError
from hal.targets import Registry, check_routes
from hal.targets.rknn import RknnOptions
from tests.passes.toys import Toy
from tests.targets.rknn import toolkit

DESCRIPTOR = """
schema = 1
name = "chip"
kind = "npu"
[behaviour]
dynamic_shapes = false
[routes.chip]
backend = "rknn"
{route}
"""
ROUTE = 'platform = "chip"\npackages = ["numpy"]\nalone = ["toolkit==1"]\nseconds = 60\n'


def described(folder: Path, route: str = ROUTE) -> Path:
    file = folder / "chip.toml"
    file.write_text(DESCRIPTOR.format(route=route))
    return file


@pytest.fixture(autouse=True)
def environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAL_ENVIRONMENTS", str(tmp_path / "environments"))
    monkeypatch.setenv("HAL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def target(tmp_path: Path) -> str:
    """A chip whose environment is there."""
    file = described(tmp_path)
    place = RknnOptions.of(Registry.discover("").from_file(file)).environment
    toolkit.install(place.folder / "venv")
    (place.folder / "made.json").write_text("{}")
    return str(file)


def saved(toy: Toy, folder: Path) -> Path:
    ir.save(toy.graph().model, folder / "model.onnx")
    return folder / "model.onnx"


def product(folder: Path, rows: int | str = 2, *ops: str) -> Path:
    """``x @ w``, and then one op after the other."""
    toy = Toy(x=[rows, 4])
    value = toy("MatMul", toy.x, np.full((4, 4), 0.25, np.float32))
    for op in ops:
        value = toy(op, value)
    toy.output(value, "y")
    return saved(toy, folder)


def compiled(model: Path, target: str, **options: Any) -> hal.Bundle:
    return hal.compile(model, target=target, output=model.with_suffix(".hal"), **options)


def placement(bundle: hal.Bundle) -> dict[str, Any]:
    (build,) = bundle.manifest.builds.values()
    return dict(build.placement)


@pytest.mark.parametrize(
    ("route", "words"),
    [
        ('packages = ["numpy"]', "platform: Field required"),
        ('platform = "chip"', "packages: Field required"),
        (ROUTE + "opset = 0", "opset: .*greater than 0"),
        (ROUTE + 'provider = "P"', "provider: Extra inputs"),
    ],
)
def test_a_wrong_route_is_told(tmp_path: Path, route: str, words: str) -> None:
    file = described(tmp_path, route)
    with pytest.raises(DescriptorError, match=words):
        check_routes(Registry.discover("").from_file(file), str(file))


def test_a_toolkit_that_is_not_installed_is_told(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"needs toolkit==1, numpy in an environment") as caught:
        compiled(product(tmp_path), str(described(tmp_path)))
    assert caught.value.hint == "hal targets setup chip"


def test_static_shapes_are_asked_for_by_name(tmp_path: Path, target: str) -> None:
    with pytest.raises(UnsupportedError, match=r"static shapes only.*'batch'"):
        compiled(product(tmp_path, "batch"), target)


def test_the_bundle_holds_the_program_and_the_simulator_runs_its_model(
    tmp_path: Path, target: str
) -> None:
    bundle = compiled(product(tmp_path, 2, "Relu"), target)
    assert placement(bundle)["assigned"] == {"rknn": 2}
    (build,) = bundle.manifest.builds.values()
    record, folder = build.segments[0]["record"], build.segments[0]["folder"]
    assert bytes(bundle.files.mapped(f"{folder}/{record['program']}")).startswith(b"RKNN")
    assert (record["layers"], record["layers_on_processor"]) == (2, {})
    assert record["layer_dtypes"] == {"float16": 2}
    x = np.array([[1 / 3, -1, 2, 5]] * 2, np.float32)
    result = np.asarray(bundle.session()(x))
    narrow = np.maximum(x.astype(np.float16).astype(np.float32).mean(1), 0)
    np.testing.assert_allclose(result, np.repeat(narrow[:, None], 4, 1), rtol=1e-6)
    assert not list(Path.cwd().glob("check*.onnx"))


def test_images_keep_their_channels_first(tmp_path: Path, target: str) -> None:
    toy = Toy(x=[1, 3, 5, 4])
    toy.output(toy("GlobalAveragePool", toy.x), "y")
    bundle = compiled(saved(toy, tmp_path), target)
    x = np.random.default_rng(0).standard_normal((1, 3, 5, 4)).astype(np.float32)
    result = np.asarray(bundle.session()(x))
    np.testing.assert_allclose(result, x.mean((2, 3), keepdims=True), atol=2e-3)


@pytest.mark.parametrize(
    ("op", "reason"),
    [
        ("Det", "rknn-toolkit2 refuses it: .*Det is not supported"),
        ("Sin", "rknn-toolkit2 runs Sin on the processor, not on the NPU"),
        (
            "Sinh",
            "rknn-toolkit2 refuses it: the worker of chip died during 'build': signal SIGABRT",
        ),
    ],
)
def test_what_the_toolkit_does_not_put_on_the_npu_goes_to_the_host(
    tmp_path: Path, target: str, op: str, reason: str
) -> None:
    toy = Toy(x=[2, 4, 4])
    value = toy("MatMul", toy.x, np.eye(4, dtype=np.float32))
    value = toy(op, value)
    toy.output(toy("Relu", value), "y")
    bundle = compiled(saved(toy, tmp_path), target)
    found = placement(bundle)
    assert found["assigned"] == {"rknn": 2, "onnxruntime": 1}
    (refusal,) = found["refused"]
    assert refusal["op"] == op
    assert re.match(reason, refusal["reason"]), refusal["reason"]


def test_without_fallback_the_reason_is_the_error(tmp_path: Path, target: str) -> None:
    with pytest.raises(UnsupportedError, match=r"Sin .*on the processor"):
        compiled(product(tmp_path, 4, "Sin"), target, fallback=False)


def test_a_node_that_fits_alone_and_not_in_company_is_left_to_the_host(
    tmp_path: Path, target: str
) -> None:
    bundle = compiled(product(tmp_path, 2, "Cosh", "Relu"), target)
    found = placement(bundle)
    assert found["assigned"] == {"rknn": 2, "onnxruntime": 1}
    (refused,) = found["refused"]
    assert "takes it alone, but not behind what comes before it" in refused["reason"]


def test_a_program_that_computes_wrongly_is_found(tmp_path: Path, target: str) -> None:
    with pytest.raises(CheckFailed, match=r"failed on chip:chip: .*\(Elu, node"):
        compiled(product(tmp_path, 2, "Relu", "Elu"), target)


def test_a_chip_that_the_toolkit_does_not_know_is_told(tmp_path: Path, target: str) -> None:
    file = Path(target)
    file.write_text(file.read_text().replace('platform = "chip"', 'platform = "other"'))
    with pytest.raises(UnsupportedError, match="no reason is given"):
        compiled(product(tmp_path), target, fallback=False)


def test_an_environment_that_is_broken_is_an_error_and_no_refusal(
    tmp_path: Path, target: str
) -> None:
    (api,) = Path(tmp_path / "environments").glob("*/venv/lib/rknn/api/__init__.py")
    api.write_text("import no_such_module\n")
    with pytest.raises(TargetError, match="no_such_module"):
        compiled(product(tmp_path), target)
