"""Bundles that are damaged, foreign, newer or incomplete."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import hal
from tests import files
from tests.bad_input.cases import ROUTE, Case, cases, check_cli, check_text


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
