import importlib.metadata
import os
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hal.errors import DescriptorError, TargetError
from hal.targets import Registry, list_backends, list_targets, load_backend, resolve

TOML = """
schema = 1
name = "{name}"
kind = "npu"
{more}
[routes.own]
backend = "vendor"
"""

Plugins = Callable[..., None]


class FakePoint:
    """An entry point whose ``load`` gives a value or raises it."""

    def __init__(self, name: str, value: Any, package: str = "vendor-kit") -> None:
        self.name = name
        self.value = f"{package}:{name}"
        self.dist = types.SimpleNamespace(name=package, version="1.0")
        self._loaded = value

    def load(self) -> Any:
        if isinstance(self._loaded, Exception):
            raise self._loaded
        return self._loaded


class FakePoints(list[FakePoint]):
    @property
    def names(self) -> set[str]:
        return {point.name for point in self}


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> Plugins:
    def install(**groups: list[FakePoint]) -> None:
        def entry_points(*, group: str) -> FakePoints:
            return FakePoints(groups.get(group.removeprefix("hal."), []))

        monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)

    return install


def write(folder: Path, name: str, more: str = "") -> Path:
    file = folder / f"{name}.toml"
    file.write_text(TOML.format(name=name, more=more))
    return file


def test_the_library_and_this_machine_are_always_there() -> None:
    infos = list_targets()
    assert infos[0].name == "host"
    assert {"host", "cpu", "x86-64", "x86-64-v3", "x86-64-v4"} <= {i.name for i in infos}
    assert [i.problem for i in infos] == [""] * len(infos)


def test_every_figure_of_the_library_has_a_source() -> None:
    registry = Registry.discover("")
    for name in registry.names():
        described = registry.descriptor(name)
        figures = [
            *described.peaks.values(),
            *(i.rate for i in described.instructions),
            *(m.capacity for m in described.memory),
        ]
        assert all(f.source for f in figures if f is not None)


@pytest.mark.parametrize(
    ("name", "target", "route", "backend"),
    [
        ("host", "host", "onnxruntime", "onnxruntime"),
        ("host:tvm", "host", "tvm", "tvm"),
        ("x86-64-v3:onnxruntime", "x86-64-v3", "onnxruntime", "onnxruntime"),
    ],
)
def test_a_name_means_one_chip_through_one_backend(
    name: str, target: str, route: str, backend: str
) -> None:
    found = resolve(name)
    assert (found.target, found.route_name, found.backend) == (target, route, backend)
    assert found.name == f"{target}:{route}"


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("hots", "unknown target 'hots'", "did you mean 'host'?"),
        ("host:tmv", "target 'host' has no route 'tmv'", "did you mean 'tvm'?"),
    ],
)
def test_an_unknown_name_is_told_with_a_suggestion(name: str, message: str, hint: str) -> None:
    with pytest.raises(TargetError) as caught:
        resolve(name)
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_a_wider_level_inherits_and_overrides() -> None:
    registry = Registry.discover("")
    narrow, wide = registry.descriptor("x86-64"), registry.descriptor("x86-64-v4")
    assert (narrow.vector_lanes("float32"), wide.vector_lanes("float32")) == (4, 16)
    assert wide.kind == narrow.kind == "cpu"
    assert wide.instruction("dot", types=("u8", "i8", "i32")) is None
    assert wide.routes["tvm"].target["mcpu"] == "x86-64-v4"  # type: ignore[union-attr]


def test_files_and_folders_of_the_target_path_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "more"
    folder.mkdir()
    file = write(tmp_path, "first")
    write(folder, "second", 'extends = "x86-64"')
    monkeypatch.setenv("HAL_TARGET_PATH", os.pathsep.join([str(file), str(folder)]))
    assert resolve("first").backend == "vendor"
    assert resolve("second:tvm").descriptor.vector.bits == 128


def test_a_path_may_stand_for_a_target(tmp_path: Path) -> None:
    file = write(tmp_path, "mine", 'extends = "x86-64-v3"')
    assert resolve(str(file)).target == "mine"
    assert resolve(f"{file}:tvm").backend == "tvm"


def test_an_extends_circle_is_told_with_its_chain(tmp_path: Path) -> None:
    write(tmp_path, "a", 'extends = "b"')
    write(tmp_path, "b", 'extends = "c"')
    write(tmp_path, "c", 'extends = "a"')
    with pytest.raises(DescriptorError, match=r"extends goes in a circle: a -> b -> c -> a"):
        Registry.discover(str(tmp_path)).resolve("a")


def test_an_unknown_parent_is_told(tmp_path: Path) -> None:
    write(tmp_path, "a", 'extends = "x86-64-v9"')
    with pytest.raises(DescriptorError, match="extends names the unknown target 'x86-64-v9'"):
        Registry.discover(str(tmp_path)).resolve("a")


def test_an_error_in_a_parent_names_the_parents_file(tmp_path: Path) -> None:
    write(tmp_path, "parent", 'colour = "red"')
    write(tmp_path, "child", 'extends = "parent"')
    with pytest.raises(DescriptorError, match=r"parent\.toml: unknown field 'colour'"):
        Registry.discover(str(tmp_path)).resolve("child")


def test_a_broken_file_is_reported_and_hides_no_other(tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("name = ")
    write(tmp_path, "good")
    registry = Registry.discover(f"{tmp_path}{os.pathsep}/no/such/place")
    assert registry.resolve("good").target == "good"
    problems = {i.name: i.problem for i in registry.list() if i.problem}
    assert "not valid TOML" in problems["broken"]
    assert "does not exist" in problems["/no/such/place"]
    with pytest.raises(DescriptorError, match=r"broken\.toml: not valid TOML"):
        registry.resolve("broken")


def test_two_descriptors_of_one_name_are_both_named(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    write(tmp_path / "one", "same")
    write(tmp_path / "two", "same")
    registry = Registry.discover(str(tmp_path))
    with pytest.raises(TargetError, match=r"'same' is described twice: .*one.*two"):
        registry.resolve("same")
    assert registry.resolve("host").target == "host"


def test_nobody_may_call_a_target_host(tmp_path: Path) -> None:
    write(tmp_path, "host")
    registry = Registry.discover(str(tmp_path))
    assert registry.resolve("host").backend == "onnxruntime"
    assert any("belongs to the machine" in i.problem for i in registry.list())


def test_packages_bring_targets_as_functions_modules_and_dicts(
    tmp_path: Path, plugins: Plugins
) -> None:
    table = {"schema": 1, "name": "as-dict", "kind": "npu", "extends": "x86-64"}
    module = types.ModuleType("vendor")
    module.__file__ = str(tmp_path / "__init__.py")
    write(tmp_path, "in-module")
    other = tmp_path / "other"
    other.mkdir()
    by_function = write(other, "by-function")
    plugins(
        targets=[
            FakePoint("a", lambda: [by_function, table]),
            FakePoint("b", module),
        ]
    )
    registry = Registry.discover("")
    assert {"as-dict", "by-function", "in-module"} <= set(registry.names())
    assert any(i.origin == "vendor-kit 1.0" for i in registry.list())


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (ImportError("no driver"), "cannot be loaded: ImportError: no driver"),
        (lambda: [1], "gave a int, not a path or a dict"),
        (lambda: [{"schema": 1}], "missing field 'name'"),
    ],
)
def test_a_broken_package_is_reported_and_hides_no_other(
    plugins: Plugins, value: Any, reason: str
) -> None:
    plugins(targets=[FakePoint("bad", value)])
    registry = Registry.discover("")
    assert registry.resolve("host").target == "host"
    assert any(reason in info.problem for info in registry.list())


def test_an_unknown_backend_is_told(plugins: Plugins) -> None:
    plugins(backends=[FakePoint("tvm", object)])
    with pytest.raises(TargetError, match="no installed package provides the backend 'tmv'") as e:
        load_backend("tmv")
    assert e.value.hint == "did you mean 'tvm'?"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (ImportError("no driver"), "cannot be imported: ImportError: no driver"),
        (type("Other", (), {"hal_api": "2"}), "was written for hal_api '2', this hal speaks '1'"),
        (type("Old", (), {}), "was written for hal_api None"),
        (type("Plain", (), {"hal_api": "1"}), "is not a subclass of hal.targets.Backend"),
    ],
)
def test_a_backend_that_breaks_the_contract_is_refused_and_hides_no_other(
    plugins: Plugins, value: Any, reason: str
) -> None:
    real = importlib.metadata.EntryPoint(
        "onnxruntime", "hal.targets.onnxruntime:OnnxRuntimeBackend", "hal.backends"
    ).load()
    plugins(
        backends=[FakePoint("npu", value), FakePoint("onnxruntime", real, package="hal-compiler")]
    )
    with pytest.raises(TargetError, match=reason):
        load_backend("npu")
    statuses = {info.name: info.status for info in list_backends()}
    assert statuses == {"npu": "broken", "onnxruntime": "present"}


def test_two_packages_with_one_backend_are_both_named(plugins: Plugins) -> None:
    plugins(backends=[FakePoint("npu", object, "kit-a"), FakePoint("npu", object, "kit-b")])
    with pytest.raises(TargetError, match=r"provided twice: kit-a 1\.0 and kit-b 1\.0"):
        load_backend("npu")


def test_a_plus_joins_targets_but_not_within_the_path_of_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "c++"
    folder.mkdir()
    file = write(folder, "chip")
    alone = Registry.discover("").resolve(f"{file}:own")
    assert (alone.name, alone.stages) == ("chip:own", ())
    for name in (f"{file}:own+host", f"{file}+host", f"host + {file}:own", f"{file}+{file}+host"):
        stages = Registry.discover("").resolve(name).stages
        assert [s.target for s in stages] == re.findall("chip(?=.toml)|host", name)
    both = Registry.discover("").resolve("cpu:onnxruntime + host:onnxruntime")
    assert both.name == "cpu:onnxruntime+host:onnxruntime"
    assert [stage.target for stage in both.stages] == ["cpu", "host"]
    with pytest.raises(TargetError, match="unknown target 'cpuu'"):
        Registry.discover("").resolve("host+cpuu")
