"""Routes of vendors' providers: what is checked before anything of a vendor is there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import hal
from hal.errors import DescriptorError, TargetError, UnsupportedError
from hal.targets import Registry, check_routes
from tests.passes.toys import Toy

DESCRIPTOR = """
schema = 1
name = "chip"
kind = "npu"
[behaviour]
dynamic_shapes = {dynamic}
[routes.chip]
backend = "provider"
{route}
"""
ROUTE = 'provider = "ChipExecutionProvider"\npackages = ["chip==1"]\n'


def described(folder: Path, route: str = ROUTE, dynamic: str = "true") -> Path:
    file = folder / "chip.toml"
    file.write_text(DESCRIPTOR.format(route=route, dynamic=dynamic))
    return file


@pytest.fixture(autouse=True)
def environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HAL_ENVIRONMENTS", str(tmp_path / "environments"))
    return tmp_path / "environments"


def model(folder: Path, rows: int | str = 2) -> Path:
    toy = Toy(x=[rows, 4])
    toy.output(toy("MatMul", toy.x, np.ones((4, 3), np.float32)), "y")
    ir.save(toy.graph().model, folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.parametrize(
    ("route", "words"),
    [
        ('packages = ["chip"]', "provider: Field required"),
        ('provider = "P"', "packages: Field required"),
        ('provider = "P"\npackages = []', "packages: .*at least 1"),
        (ROUTE + "seconds = 0", "seconds: .*greater than 0"),
        (ROUTE + "speed = 3", "speed: Extra inputs"),
    ],
)
def test_a_wrong_route_is_told(tmp_path: Path, route: str, words: str) -> None:
    file = described(tmp_path, route)
    with pytest.raises(DescriptorError, match=words):
        check_routes(Registry.discover("").from_file(file), str(file))


def test_an_environment_that_is_not_made_is_told(tmp_path: Path) -> None:
    target = str(described(tmp_path))
    with pytest.raises(TargetError, match=r"needs numpy, chip==1 in an environment") as caught:
        hal.compile(model(tmp_path), target=target, output=tmp_path / "m.hal")
    assert caught.value.hint == "hal targets setup chip:chip"


def test_static_shapes_are_asked_for_by_name(tmp_path: Path) -> None:
    target = str(described(tmp_path, dynamic="false"))
    with pytest.raises(UnsupportedError, match=r"static shapes only.*'x'.*'batch'") as caught:
        hal.compile(model(tmp_path, "batch"), target=target, output=tmp_path / "m.hal")
    assert "--dim batch=" in caught.value.hint
