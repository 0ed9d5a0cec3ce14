"""Targets and descriptors that do not exist or are wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import hal
from tests import files
from tests.bad_input.cases import Case, cases, check_cli, check_text

GOOD = 'schema = 1\nname = "chip"\nkind = "npu"\n[routes.onnxruntime]\nproviders = ["CPUExecutionProvider"]\n'


def described(*texts: str) -> Callable[[Path], Path]:
    """Write descriptor files; HAL_TARGET_PATH is set to the folder by the tests."""

    def make(folder: Path) -> Path:
        for index, text in enumerate(texts):
            (folder / f"{index}.toml").write_text(text)
        return folder

    return make


TARGETS = [
    Case(
        "unknown target",
        hal.TargetError,
        described(),
        ("unknown target 'hots'",),
        "did you mean 'host'?",
        "hots",
    ),
    Case(
        "unknown route",
        hal.TargetError,
        described(),
        ("target 'host' has no route 'tmv'",),
        "did you mean 'tvm'?",
        "host:tmv",
    ),
    Case(
        "missing descriptor file",
        hal.TargetError,
        described(),
        ("nowhere.toml: cannot be read",),
        "check the path",
        "nowhere.toml",
    ),
    Case(
        "wrong type",
        hal.DescriptorError,
        described("cores = 'many'\n" + GOOD),
        ("0.toml: cores", "many"),
        "hal targets schema",
        "chip",
    ),
    Case(
        "missing field",
        hal.DescriptorError,
        described(GOOD.replace('kind = "npu"\n', "")),
        ("0.toml: missing field 'kind'",),
        "",
        "chip",
    ),
    Case(
        "unknown field",
        hal.DescriptorError,
        described("coars = 4\n" + GOOD),
        ("0.toml: unknown field 'coars'",),
        "did you mean 'cores'?",
        "chip",
    ),
    Case(
        "extends in a circle",
        hal.DescriptorError,
        described(
            'schema = 1\nname = "chip"\nextends = "block"\n',
            'schema = 1\nname = "block"\nextends = "chip"\n',
        ),
        ("toml: extends goes in a circle: chip -> block -> chip",),
        "remove",
        "chip",
    ),
    Case(
        "extends nothing",
        hal.DescriptorError,
        described('schema = 1\nname = "chip"\nextends = "x86-46"\n'),
        ("0.toml: extends names the unknown target 'x86-46'",),
        "did you mean 'x86-64'?",
        "chip",
    ),
    Case(
        "figure without a source",
        hal.DescriptorError,
        described('clock = { value = 1, unit = "GHz", confidence = "vendor" }\n' + GOOD),
        ("0.toml: missing field 'clock.source'",),
        "",
        "chip",
    ),
    Case(
        "broken TOML",
        hal.DescriptorError,
        described('schema = 1\nname = "chip\n'),
        ("0.toml: not valid TOML", "line 2"),
        "syntax",
        "{folder}/0.toml",
    ),
    Case(
        "newer schema",
        hal.DescriptorError,
        described(GOOD.replace("schema = 1", "schema = 2")),
        ("0.toml: schema = 2 is newer",),
        "upgrade",
        "chip",
    ),
    Case(
        "described twice",
        hal.TargetError,
        described(GOOD, GOOD),
        ("target 'chip' is described twice", "0.toml", "1.toml"),
        "rename",
        "chip",
    ),
    Case(
        "no route",
        hal.DescriptorError,
        described('schema = 1\nname = "chip"\nkind = "npu"\n'),
        ("target 'chip' has no route",),
        "[routes.",
        "chip",
    ),
    Case(
        "backend that is not installed",
        hal.TargetError,
        described(GOOD.replace("onnxruntime", "a") + 'backend = "tvn"\n'),
        ("no installed package provides the backend 'tvn'",),
        "did you mean 'tvm'?",
        "chip",
    ),
    Case(
        "provider that is not there",
        hal.TargetError,
        described(GOOD.replace("CPU", "Moon")),
        ("has no MoonExecutionProvider",),
        "",
        "chip",
    ),
]


@pytest.mark.parametrize(
    ("route", "message", "hint"),
    [
        ('a = { backend = "tvn" }', "routes.a: no installed package", "did you mean 'tvm'?"),
        ('a = { backend = "x", package = "x-hal" }', "provides the backend 'x'", "pip install x-"),
        ('tvm = { target = { kind = "lvm" } }', "no target kind 'lvm'; did you mean 'llvm'?", "r"),
        ('tvm = { target = { kind = "llvm", mcpv = "a" } }', "does not take the target", "correct"),
        ('onnxruntime = { providers = [""] }', "a provider has an empty name", "correct"),
        (
            'onnxruntime = { providers = ["CPUExecutionProvidr"] }',
            "knows no provider 'CPUExecutionProvidr'",
            "correct the table [routes.onnxruntime]",
        ),
        (
            'onnxruntime = { providers = ["CPUExecutionProvider"], provider_options = { B = {} } }',
            "provider_options are given for 'B'",
            "correct",
        ),
    ],
)
def test_validating_asks_the_backends_of_the_routes(
    route: str, message: str, hint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "tvm =" in route:
        pytest.importorskip("tvm")
    file = tmp_path / "chip.toml"
    file.write_text(f'schema = 1\nname = "chip"\nkind = "npu"\n[routes]\n{route}\n')
    case = Case("", hal.DescriptorError, lambda f: f, ("chip.toml: routes.", message), hint)
    check_cli(case, ["targets", "validate", str(file)], capsys)


@pytest.fixture
def targets_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "targets"
    folder.mkdir()
    (tmp_path / "out").mkdir()
    files.save_mlp(tmp_path / "mlp.onnx")
    monkeypatch.setenv("HAL_TARGET_PATH", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


@cases(TARGETS)
def test_a_bad_target_is_refused(case: Case, targets_folder: Path, tmp_path: Path) -> None:
    case.make(targets_folder)
    before = files.listing(tmp_path)
    target = case.target.format(folder=targets_folder)
    with pytest.raises(case.error) as caught:
        hal.compile("mlp.onnx", target=target, output="out/mlp.hal")
    check_text(case, caught.value.message, caught.value.hint)
    assert caught.value.hint
    assert files.listing(tmp_path) == before


@cases(TARGETS)
def test_a_bad_target_is_refused_on_the_command_line(
    case: Case, targets_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case.make(targets_folder)
    before = files.listing(tmp_path)
    target = case.target.format(folder=targets_folder)
    check_cli(case, ["compile", "mlp.onnx", "-o", "out/mlp.hal", "--target", target], capsys)
    assert files.listing(tmp_path) == before


def test_a_broken_descriptor_does_not_hide_the_others(targets_folder: Path) -> None:
    described("coars = 4\n" + GOOD, GOOD.replace('"chip"', '"good"'))(targets_folder)
    problems = {t.name: t.problem for t in hal.list_targets()}
    assert problems["good"] == ""
    assert "coars" in problems["chip"]
    assert hal.compile("mlp.onnx", target="good").targets == ("good:onnxruntime",)
