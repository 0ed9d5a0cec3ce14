"""A build as a page: which build, where to, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("tvm")

import hal
from tests import files
from tests.compiler.support import use_vendor
from tests.passes.toys import Toy
from tests.targets.aot import wasm

DESCRIPTOR = """
schema = 1
name = "engine"
extends = "cpu"
[routes.c]
backend = "aot"
target = {{ kind = "llvm" }}
compile = [{command}]
"""
COMPILER = """import sys
from pathlib import Path
Path(sys.argv[sys.argv.index("-o") + 1]).write_bytes(bytes.fromhex("{program}"))
"""


def model(folder: Path) -> Path:
    """``y = x + [1, 2, 3, 4]``, which the program made by hand computes."""
    toy = Toy(x=[1, 4])
    toy.output(toy("Add", toy.x, np.arange(1, 5, dtype=np.float32)), "y")
    ir.save(toy.graph().model, folder / "sum.onnx")
    return folder / "sum.onnx"


def engine(folder: Path, compiler: str | None = None) -> str:
    """A target whose C compiler links the program made by hand, or is another."""
    script = folder / "compiler.py"
    script.write_text(COMPILER.format(program=wasm.program().hex()))
    command = f'"{compiler}"' if compiler else f'"{sys.executable}", "{script}"'
    (folder / "engine.toml").write_text(DESCRIPTOR.format(command=command))
    return f"{folder / 'engine.toml'}:c"


@pytest.fixture
def bundle(tmp_path: Path) -> hal.Bundle:
    targets = ["host:onnxruntime", engine(tmp_path)]
    return hal.compile(model(tmp_path), target=targets, output=tmp_path / "b.hal", verify=False)


def test_the_page_is_of_the_first_build_that_a_browser_runs(
    bundle: hal.Bundle, tmp_path: Path
) -> None:
    written = bundle.page(tmp_path / "site")
    assert written["target"] == "engine:c"
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "site").iterdir()}
    assert written["files"] == sizes
    assert written["bytes"] == sum(sizes.values())
    about = json.loads((tmp_path / "site" / "model.json").read_text())
    assert about["name"] == bundle.manifest.name
    assert about["inputs"] == [{"name": "x", "dtype": "float32", "shape": [1, 4]}]
    weights = np.fromfile(tmp_path / "site" / "weights.bin", np.float32)
    assert weights[:4].tolist() == [1, 2, 3, 4]


def test_an_earlier_page_is_replaced_and_nothing_else(bundle: hal.Bundle, tmp_path: Path) -> None:
    site = tmp_path / "site"
    bundle.page(site, "engine")
    (site / "weights.bin").write_bytes(b"")
    bundle.page(site)
    assert (site / "weights.bin").stat().st_size
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "note").touch()
    for place, words in [
        ("other", "holds 'note', which is of no page"),
        ("b.hal", "exists and is not a folder"),
        ("none/site", "does not exist"),
    ]:
        with pytest.raises(hal.InputError, match=words):
            bundle.page(tmp_path / place)
    assert not list(tmp_path.glob(".*tmp-*"))


def test_builds_that_no_browser_runs_are_refused(bundle: hal.Bundle, tmp_path: Path) -> None:
    with pytest.raises(
        hal.UnsupportedError, match="'onnxruntime' builds does not run in a browser"
    ):
        bundle.page(tmp_path / "site", "host:onnxruntime")
    with pytest.raises(hal.TargetError, match="no build for 'engines'") as caught:
        bundle.page(tmp_path / "site", "engines")
    assert "engine:c" in caught.value.hint
    assert "hal retarget" in caught.value.hint
    assert not (tmp_path / "site").exists()


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_a_program_of_another_machine_is_refused(tmp_path: Path) -> None:
    built = hal.compile(model(tmp_path), target=["host:tvm", engine(tmp_path, "cc")], verify=False)
    with pytest.raises(hal.UnsupportedError) as caught:
        built.page(tmp_path / "site")
    assert "host:tvm: what the backend 'tvm' builds" in caught.value.message
    assert "engine:c: the program is no WebAssembly" in caught.value.message


def test_nodes_that_are_left_to_the_host_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_vendor(monkeypatch, tmp_path, "picky")
    built = hal.compile(files.save_mlp(tmp_path / "mlp.onnx"), target="acme-1", verify=False)
    with pytest.raises(hal.UnsupportedError) as caught:
        built.page(tmp_path / "page")
    assert "leaves nodes to the host, which a page has not" in caught.value.message
    assert "1 × Relu ('middle'): no comparisons in hardware" in caught.value.message
