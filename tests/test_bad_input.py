"""Wrong input of every kind: one sentence that names the thing and the place, and what to do.

Each case is tried through the Python API and through the command line, and must leave the disk as
it was.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import hal
from hal.cli import main
from tests import files

ROUTE = "host:onnxruntime"


@dataclasses.dataclass(frozen=True)
class Case:
    """What goes wrong: how to prepare it, and what the message and the hint must say.

    ``make`` gets an empty folder and returns the model (or bundle) to use; ``target`` is what to
    compile for. ``says`` are parts of the message, ``hint`` is a part of the hint.
    """

    name: str
    error: type[hal.HalError]
    make: Callable[[Path], str | Path]
    says: tuple[str, ...]
    hint: str
    target: str = ROUTE


def cases(items: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in items])


def check_text(case: Case, message: str, hint: str) -> None:
    for part in case.says:
        assert part in message
    assert case.hint in hint
    assert "\n" not in message.strip()
    assert len(message) < 600


def check_cli(
    case: Case, arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 2
) -> None:
    """The command must print ``error: …`` and ``hint: …`` on stderr and nothing on stdout."""
    capsys.readouterr()
    assert main(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert [line.split(" ")[0] for line in lines] == ["error:", "hint:"], err
    assert "Traceback" not in err
    assert "internal" not in lines[0]
    check_text(case, lines[0], lines[1])


# -- models -----------------------------------------------------------------------------------


def text_file(folder: Path) -> Path:
    (folder / "notes.onnx").write_text("This is not a model.\n" * 40)
    return folder / "notes.onnx"


def empty_file(folder: Path) -> Path:
    (folder / "empty.onnx").write_bytes(b"")
    return folder / "empty.onnx"


def truncated(folder: Path) -> Path:
    path = files.save_mlp(folder / "cut.onnx")
    path.write_bytes(path.read_bytes()[:-500])
    return path


def without_external_data(folder: Path) -> Path:
    path, data = files.save_external_mlp(folder)
    data.unlink()
    return path


def short_external_data(folder: Path) -> Path:
    path, data = files.save_external_mlp(folder)
    data.write_bytes(data.read_bytes()[:-64])
    return path


def external_data_outside(folder: Path) -> Path:
    path, data = files.save_external_mlp(folder / "inside")
    data.rename(folder / "outside.data")
    files.repoint_external(path, "../outside.data")
    return path


def absolute_external_data(folder: Path) -> Path:
    path, data = files.save_external_mlp(folder)
    files.repoint_external(path, str(data.resolve()))
    return path


def external_data_by_link(folder: Path) -> Path:
    path, data = files.save_external_mlp(folder / "inside")
    data.rename(folder / "outside.data")
    data.symlink_to(folder / "outside.data")
    return path


def hugging_face(folder: Path, **config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return folder


def broken_weights(folder: Path) -> Path:
    hugging_face(folder, architectures=["LlamaForCausalLM"], vocab_size=16)
    (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    return folder


def mystery_op(folder: Path) -> Path:
    path = folder / "mystery.onnx"
    onnx.save_model(files.mlp(op="Mystery", domain="com.example"), path)
    return path


def unknown_standard_op(folder: Path) -> Path:
    path = folder / "unknown.onnx"
    onnx.save_model(files.mlp(op="Reluu"), path)
    return path


def invalid_graph(folder: Path) -> Path:
    model = files.mlp()
    model.graph.node[1].input[0] = "nothing"
    onnx.save_model(model, folder / "invalid.onnx")
    return folder / "invalid.onnx"


MODELS = [
    Case(
        "missing file",
        hal.ModelError,
        lambda folder: folder / "nowhere.onnx",
        ("no such file", "nowhere.onnx"),
        "check the path",
    ),
    Case("text file", hal.ModelError, text_file, ("notes.onnx", "not"), "onnx"),
    Case("empty file", hal.ModelError, empty_file, ("empty.onnx",), ""),
    Case("truncated ONNX", hal.ModelError, truncated, ("cut.onnx",), "again"),
    Case(
        "missing external data",
        hal.ModelError,
        without_external_data,
        ("model.data", "model.onnx"),
        "put the file model.data into",
    ),
    Case(
        "short external data",
        hal.ModelError,
        short_external_data,
        ("model.data", "bytes"),
        "again",
    ),
    Case(
        "external data outside",
        hal.ModelError,
        external_data_outside,
        ("../outside.data", "model.onnx"),
        "",
    ),
    Case("absolute external data", hal.ModelError, absolute_external_data, ("model.onnx",), ""),
    Case("external data behind a link", hal.ModelError, external_data_by_link, ("model.onnx",), ""),
    Case(
        "unknown suffix",
        hal.ModelError,
        lambda folder: files.save_mlp(folder / "model.txt"),
        ("model.txt is of no known kind of model",),
        ".onnx or .pt2",
    ),
    Case(
        "directory without config",
        hal.ModelError,
        lambda folder: folder,
        ("has no config.json",),
        "save_pretrained",
    ),
    Case(
        "config that is no JSON",
        hal.ModelError,
        lambda folder: (folder / "config.json").write_text("{oops") and folder,
        ("config.json is not valid JSON",),
        "",
    ),
    Case(
        "directory without weights",
        hal.ModelError,
        lambda folder: hugging_face(folder, architectures=["LlamaForCausalLM"]),
        ("has no weights",),
        "next to config.json",
    ),
    Case(
        "damaged weights",
        hal.ModelError,
        broken_weights,
        ("the weights in", "cannot be loaded"),
        "damaged",
    ),
    Case(
        "unknown architecture",
        hal.ModelError,
        lambda folder: hugging_face(folder, architectures=["LlamaForCasualLM"]),
        ("unknown architecture 'LlamaForCasualLM'", "config.json"),
        "did you mean 'LlamaForCausalLM'?",
    ),
    Case(
        "no architecture",
        hal.ModelError,
        hugging_face,
        ("names no architecture",),
        "architectures",
    ),
    Case(
        "unknown module",
        hal.ModelError,
        lambda _: "python:nowhere_to_be_found:f",
        ("cannot import module 'nowhere_to_be_found'",),
        "importable",
    ),
    Case(
        "op that nothing covers",
        hal.UnsupportedError,
        mystery_op,
        ("Mystery", "node 'middle'", "onnxruntime"),
        "",
    ),
    Case(
        "op that nothing covers, with fallback",
        hal.UnsupportedError,
        mystery_op,
        ("Mystery", "node 'middle'", "tvm", "onnxruntime"),
        "",
        "host:tvm",
    ),
    Case(
        "op that is not in the operator set",
        hal.HalError,
        unknown_standard_op,
        ("Reluu", "node 'middle'"),
        "",
    ),
    Case("invalid graph", hal.HalError, invalid_graph, ("nothing",), ""),
]


@cases(MODELS)
def test_a_bad_model_is_refused(case: Case, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "out").mkdir()
    model = case.make(tmp_path / "model")
    before = files.listing(tmp_path)
    with pytest.raises(case.error) as caught:
        hal.compile(model, target=case.target, output=tmp_path / "out" / "m.hal")
    check_text(case, caught.value.message, caught.value.hint)
    assert caught.value.hint
    assert files.listing(tmp_path) == before


@cases(MODELS)
def test_a_bad_model_is_refused_on_the_command_line(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "out").mkdir()
    model = case.make(tmp_path / "model")
    before = files.listing(tmp_path)
    output = str(tmp_path / "out" / "m.hal")
    check_cli(case, ["compile", str(model), "-o", output, "--target", case.target], capsys)
    assert files.listing(tmp_path) == before


# -- targets ----------------------------------------------------------------------------------

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


# -- calls ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> hal.Bundle:
    """``total = a + b``, ``difference = a - b``, int64 [n, 2]."""
    folder = tmp_path_factory.mktemp("pair")
    return hal.compile(
        files.two_in_two_out(folder / "pair.onnx"), target=ROUTE, output=folder / "pair.hal"
    )


GOOD_PAIR = {"a": np.array([[1, 2]]), "b": np.array([[3, 4]])}
CALLS = [
    ("wrong name", {"aa": GOOD_PAIR["a"], "b": GOOD_PAIR["b"]}, "there is no input 'aa'", "mean"),
    ("missing", {"a": GOOD_PAIR["a"]}, "input 'b' is missing", "expected"),
    (
        "wrong dtype",
        {**GOOD_PAIR, "b": np.array([[3.0, 4.0]])},
        "input 'b' has dtype float64, expected int64",
        "astype",
    ),
    (
        "wrong rank",
        {**GOOD_PAIR, "b": np.array([3, 4])},
        "input 'b' has rank 1 ([2]), expected",
        "axes",
    ),
    (
        "wrong static extent",
        {**GOOD_PAIR, "b": np.array([[3, 4, 5]])},
        "input 'b' has extent 3 on axis 1, expected 2",
        "static",
    ),
    (
        "extents that disagree",
        {**GOOD_PAIR, "b": np.array([[3, 4], [5, 6]])},
        "input 'b' has n=2 on axis 0, but input 'a' has n=1",
        "agree",
    ),
]
calls = pytest.mark.parametrize(
    ("given", "message", "hint"), [pytest.param(*c[1:], id=c[0]) for c in CALLS]
)


@calls
def test_a_bad_call_is_refused(
    pair: hal.Bundle, given: dict[str, np.ndarray], message: str, hint: str
) -> None:
    with pair.session() as session:
        with pytest.raises(hal.InputError) as caught:
            session.run(given)
        assert message in caught.value.message
        assert hint in caught.value.hint
        assert session(**GOOD_PAIR)[0].tolist() == [[4, 6]]  # the session still works


@calls
def test_a_bad_call_is_refused_on_the_command_line(
    pair: hal.Bundle,
    given: dict[str, np.ndarray],
    message: str,
    hint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options: list[str] = []
    for name, array in given.items():
        np.save(tmp_path / f"{name}.npy", array)
        options += ["--input", f"{name}={tmp_path / name}.npy"]
    case = Case("", hal.InputError, lambda folder: folder, (message,), hint)
    output = tmp_path / "out.npz"
    check_cli(case, ["run", str(pair.path), *options, "-o", str(output)], capsys)
    assert not output.exists()


@pytest.mark.parametrize("value", [object(), "text", [[1, 2], [3]], None])
def test_something_that_is_no_array_is_refused(pair: hal.Bundle, value: Any) -> None:
    with pair.session() as session, pytest.raises(hal.InputError, match="input 'b'") as caught:
        session(GOOD_PAIR["a"], value)
    assert caught.value.hint


def test_bad_arguments_of_compile_are_refused(pair: hal.Bundle, tmp_path: Path) -> None:
    model = files.save_mlp(tmp_path / "mlp.onnx")
    for options, message in (
        ({"quantize": "w4a16"}, "quantize='w4a16' is not available in this version"),
        ({"kv_cache": "paged"}, "kv_cache='paged' is not available in this version"),
        ({"target": []}, "no target is given"),
    ):
        with pytest.raises(hal.HalError, match=message) as caught:
            hal.compile(model, **options)
        assert caught.value.hint
    for thing in (3, None, {"a": 1}, np.zeros(3)):
        with pytest.raises(hal.ModelError, match="cannot load a") as caught:
            hal.compile(thing)
        assert caught.value.hint


# -- bundles ----------------------------------------------------------------------------------


def compiled(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        model = files.save_mlp(folder / "mlp.onnx")
        return hal.compile(model, target=ROUTE, output=folder / name).path

    return make


def damaged(name: str, member: str, at: float = 0.5) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = compiled(name)(folder)
        files.flip(path, member, at=at)
        return path

    return make


def newer(folder: Path) -> Path:
    path = compiled("mlp")(folder)
    manifest = json.loads((path / "manifest.json").read_text())
    text = json.dumps({**manifest, "format": 2, "novelty": True}).encode()
    (path / "manifest.json").write_bytes(text)
    digest = hashlib.sha256(text).hexdigest()
    (path / "manifest.sha256").write_text(f"{digest}  manifest.json\n")
    return path


def incomplete(folder: Path) -> Path:
    path = compiled("mlp")(folder)
    (path / "weights-00001.safetensors").unlink()
    return path


def cut_zip(folder: Path) -> Path:
    path = compiled("mlp.hal")(folder)
    path.write_bytes(path.read_bytes()[:-4000])
    return path


def escaping(folder: Path) -> Path:
    path = compiled("mlp")(folder)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../outside"] = {"size": 1, "sha256": "0" * 64}
    text = json.dumps(manifest).encode()
    (path / "manifest.json").write_bytes(text)
    (path / "manifest.sha256").write_text(f"{hashlib.sha256(text).hexdigest()}  manifest.json\n")
    return path


def linked_out(folder: Path) -> Path:
    path = compiled("mlp")(folder)
    weights = path / "weights-00001.safetensors"
    weights.rename(folder / "elsewhere")
    weights.symlink_to(folder / "elsewhere")
    return path


BUILD = "builds/host.onnxruntime/00-onnxruntime/model.onnx"
MEMBERS = {
    "weights": ("weights-00001.safetensors", "weights-00001.safetensors is damaged"),
    "graph": ("graph.onnx", "graph.onnx is damaged"),
    "build": (BUILD, "model.onnx is damaged"),
    "samples": ("samples.safetensors", "samples.safetensors is damaged"),
    "manifest": ("manifest.json", "manifest.json"),
    "manifest digest": ("manifest.sha256", "manifest.sha256"),
}
BUNDLES = [
    Case(
        f"flipped byte in {what} of a {'file' if name.endswith('.hal') else 'folder'}",
        hal.BundleError,
        damaged(name, member),
        (name, says),
        "rebuild",
    )
    for what, (member, says) in MEMBERS.items()
    for name in ("mlp", "mlp.hal")
] + [
    Case("newer format", hal.BundleError, newer, ("bundle format 2", "up to 1"), "upgrade"),
    Case(
        "no such bundle",
        hal.BundleError,
        lambda folder: folder / "nowhere.hal",
        ("no bundle at", "nowhere.hal"),
        "check the path",
    ),
    Case(
        "a file that is no bundle",
        hal.BundleError,
        lambda folder: files.save_mlp(folder / "mlp.onnx"),
        ("mlp.onnx is not a bundle",),
        "hal compile",
    ),
    Case(
        "a folder that is no bundle",
        hal.BundleError,
        lambda folder: folder,
        ("has no manifest.json",),
        "not a hal bundle",
    ),
    Case(
        "missing member",
        hal.BundleError,
        incomplete,
        ("lacks 'weights-00001.safetensors'",),
        "rebuild",
    ),
    Case("truncated file", hal.BundleError, cut_zip, ("mlp.hal is not a bundle",), ""),
    Case(
        "name that leaves the bundle",
        hal.BundleError,
        escaping,
        ("names a file outside itself: '../outside'",),
        "do not use",
    ),
    Case(
        "link that leaves the bundle",
        hal.BundleError,
        linked_out,
        ("weights-00001.safetensors", "leaves the bundle"),
        "do not use",
    ),
]


@cases(BUNDLES)
def test_a_bad_bundle_is_refused(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = case.make(tmp_path)
    before = files.listing(tmp_path)
    with pytest.raises(case.error) as caught:
        hal.load(bundle)
    check_text(case, caught.value.message, caught.value.hint)
    assert caught.value.hint
    check_cli(case, ["run", str(bundle), "--random-inputs"], capsys)
    retarget = ["retarget", str(bundle), "--target", ROUTE, "-o", str(tmp_path / "new.hal")]
    check_cli(case, retarget, capsys)
    assert files.listing(tmp_path) == before


@pytest.mark.parametrize("at", [0.0, 0.03, 0.1, 0.5, 0.9, 0.97])
def test_any_flipped_byte_of_a_bundle_file_is_noticed_or_harmless(
    tmp_path: Path, at: float
) -> None:
    path = compiled("mlp.hal")(tmp_path)
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 0x04
    path.write_bytes(data)
    try:
        bundle = hal.load(path)
    except hal.BundleError:
        return
    x = np.ones((2, files.HIDDEN), np.float32)
    with bundle.session() as session:  # the byte was padding
        assert np.allclose(session(x), files.mlp_expected(x), atol=1e-5)


# -- outputs ----------------------------------------------------------------------------------


def test_an_output_in_a_folder_that_does_not_exist_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = files.save_mlp(tmp_path / "mlp.onnx")
    case = Case("", hal.BundleError, lambda f: f, ("nowhere does not exist",), "mkdir -p")
    output = tmp_path / "nowhere" / "mlp.hal"
    with pytest.raises(hal.BundleError, match="nowhere does not exist"):
        hal.compile(model, target=ROUTE, output=output)
    check_cli(case, ["compile", str(model), "-o", str(output), "--target", ROUTE], capsys)
    assert files.listing(tmp_path).keys() == {"mlp.onnx"}


STEPS = ["write_weights", "_write_samples", "build_target", "write_manifest", "pack"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.ENOSPC, "no space left on the device"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "permission denied"),
    ],
)
def test_an_output_that_cannot_be_written_is_told_at_every_step(
    step: str, code: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = files.save_mlp(tmp_path / "mlp.onnx")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code), "somewhere")

    monkeypatch.setattr(f"hal.compiler.{step}", fail)
    with pytest.raises(hal.BundleError) as caught:
        hal.compile(model, target=ROUTE, output=tmp_path / "mlp.hal")
    assert caught.value.message == f"cannot write {tmp_path / 'mlp.hal'}: {reason}"
    assert caught.value.hint == "choose another output, or make room"
    assert files.listing(tmp_path).keys() == {"mlp.onnx"}


NAMESPACE = ["unshare", "-r", "-m"]


def can_mount() -> bool:
    """Whether this user may mount a small file system in a name space of their own."""
    try:
        command = [*NAMESPACE, "sh", "-c", "mount -t tmpfs -o size=64k none /mnt"]
        return subprocess.run(command, capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


FULL_DISK = """
import os, sys
from hal.cli import main
folder, model = sys.argv[1:]
def compile(output):
    return main(["compile", model, "-o", output, "--target", "host:onnxruntime"])
assert compile(model + ".hal") == 0  # from now on the build is in the cache
for size in (8, 16, 32):
    os.system(f"mount -t tmpfs -o size={size}k none {folder}")
    print(compile(folder + "/m.hal"), os.listdir(folder))
os.system(f"mount -o remount,ro {folder}")
print(compile(folder + "/m.hal"), os.listdir(folder))
"""


@pytest.mark.skipif(sys.platform != "linux" or not can_mount(), reason="needs mount name spaces")
def test_a_full_and_a_read_only_file_system_are_told(tmp_path: Path) -> None:
    model = files.save_mlp(tmp_path / "mlp.onnx")
    (tmp_path / "small").mkdir()
    result = subprocess.run(
        [*NAMESPACE, sys.executable, "-c", FULL_DISK, str(tmp_path / "small"), str(model)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stdout.splitlines()[-4:] == ["2 []"] * 4, result.stderr
    place = tmp_path / "small" / "m.hal"
    full = [
        f"error: cannot write {place}: no space left on the device",
        "hint: choose another output, or make room",
    ]
    assert result.stderr.splitlines() == [
        *full * 3,
        f"error: cannot write {place}: the file system is read-only",
        "hint: choose another output, or make room",
    ]


# -- interruption -----------------------------------------------------------------------------

INTERRUPTED = """
import sys, threading
import hal.compiler
from hal.cli import main

def wait(*_, **__):
    print("building", flush=True)
    threading.Event().wait(60)

hal.compiler.build_target = wait
sys.exit(main(["compile", sys.argv[1], "-o", sys.argv[2], "--target", "host:onnxruntime"]))
"""


@pytest.mark.parametrize(
    ("number", "code", "name"),
    [
        (signal.SIGINT, 2, "mlp.hal"),
        (signal.SIGTERM, 143, "mlp"),
        (signal.SIGKILL, -9, "mlp.hal"),
    ],
)
def test_an_interrupted_compile_leaves_no_bundle(
    number: signal.Signals, code: int, name: str, tmp_path: Path
) -> None:
    model = files.save_mlp(tmp_path / "mlp.onnx")
    (tmp_path / "out").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(model), str(tmp_path / "out" / name)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "building\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code
    assert "Traceback" not in err
    left = [p.name for p in (tmp_path / "out").iterdir()]
    if (
        number == signal.SIGKILL
    ):  # nothing can clean up then; what is left is never taken for a bundle
        assert [n for n in left if not n.startswith(f".{name}.tmp-")] == []
        with pytest.raises(hal.BundleError):
            hal.load(tmp_path / "out" / name)
    else:
        assert left == []


def test_a_file_that_is_no_bundle_is_not_overwritten(tmp_path: Path) -> None:
    model = files.save_mlp(tmp_path / "mlp.onnx")
    before = model.read_bytes()
    with pytest.raises(hal.BundleError, match="exists and is not a bundle"):
        hal.compile(model, output=model)
    assert model.read_bytes() == before


def test_dynamic_axes_of_a_file_are_refused(tmp_path: Path) -> None:
    model = files.save_mlp(tmp_path / "mlp.onnx")
    with pytest.raises(hal.InputError, match="fixed in the file"):
        hal.compile(model, dynamic={"x": {0: "batch"}})
    with pytest.raises(hal.InputError, match="no input 'q'"):
        hal.compile(model, inputs={"q": np.ones((2, 24), np.float32)})
