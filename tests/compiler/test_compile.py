"""From a model to a bundle: sources and outputs."""

from __future__ import annotations

import gc
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hal
from hal.runtime.cache import scratch_folder
from tests import files
from tests.compiler.support import ROUTE, is_right, names_in

# -- sources ----------------------------------------------------------------------------------


def test_an_onnx_file_of_an_old_operator_set_compiles_and_computes_the_same(
    bundle: hal.Bundle,
) -> None:
    assert bundle.targets == (ROUTE,)
    assert is_right(bundle)
    assert is_right(bundle, rows=1)


def test_an_onnx_file_with_external_data_is_self_contained_once_compiled(tmp_path: Path) -> None:
    path, _ = files.save_external_mlp(tmp_path / "source")
    compiled = hal.compile(path, target=ROUTE, output=tmp_path / "mlp.hal")
    shutil.rmtree(path.parent)
    assert is_right(compiled)


def test_a_module_compiles_with_named_dynamic_axes() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(24, 12), torch.nn.GELU()).eval()
    example = torch.randn(2, 24)
    compiled = hal.compile(module, example, target=ROUTE, dynamic={"input": {0: "rows"}})
    assert compiled.manifest.inputs[0].dims == ["rows", 24]
    session = compiled.session()
    for rows in (1, 5):
        x = torch.randn(rows, 24)
        assert np.allclose(session(x), module(x).detach().numpy(), atol=1e-5)


def test_a_hugging_face_directory_becomes_a_language_model_with_carried_state(
    language_model: tuple[torch.nn.Module, hal.Bundle],
) -> None:
    module, compiled = language_model
    assert compiled.manifest.task == "causal-lm"
    assert [s.name for s in compiled.session().inputs] == ["input_ids"]
    ids = [5, 6, 7]
    tokens = list(compiled.session().generate(ids, max_new_tokens=6, stop_token_ids=[]))
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(module(torch.tensor([ids])).logits[0, -1].argmax()))
    assert tokens == ids[3:]


def test_a_language_model_reports_top1_agreement(
    language_model: tuple[torch.nn.Module, hal.Bundle],
) -> None:
    figures = language_model[1].manifest.builds[ROUTE].verification
    assert figures is not None
    assert figures["calls"] == 3  # a prefill and two steps with state
    assert figures["outputs"]["logits"]["top1_agreement"] == 1.0


# -- outputs ----------------------------------------------------------------------------------


def test_a_name_that_ends_in_hal_makes_one_file(model: Path, tmp_path: Path) -> None:
    compiled = hal.compile(model, target=ROUTE, output=tmp_path / "mlp.hal")
    assert compiled.path.is_file()
    assert is_right(compiled)
    assert is_right(hal.load(tmp_path / "mlp.hal"))
    assert names_in(tmp_path) == ["mlp.hal"]


def test_any_other_name_makes_a_directory(bundle: hal.Bundle) -> None:
    assert bundle.path.is_dir()
    assert {"manifest.json", "manifest.sha256", "graph.onnx", "weights-00001.safetensors"} <= {
        p.name for p in bundle.path.iterdir()
    }
    assert is_right(hal.load(bundle.path))


def test_without_an_output_the_bundle_goes_with_the_object(model: Path) -> None:
    compiled = hal.compile(model, target=ROUTE, verify=False)
    path = compiled.path
    assert path.is_dir()
    del compiled
    gc.collect()
    assert not path.exists()


@pytest.mark.parametrize("name", ["mlp.hal", "mlp"])
def test_an_older_bundle_of_that_name_is_replaced(name: str, tmp_path: Path) -> None:
    first = files.save_mlp(tmp_path / "first.onnx", seed=0)
    second = files.save_mlp(tmp_path / "second.onnx", seed=1)
    output = tmp_path / "out" / name
    output.parent.mkdir()
    old = hal.compile(first, target=ROUTE, output=output)
    new = hal.compile(second, target=ROUTE, output=output)
    assert is_right(new, seed=1)
    assert names_in(output.parent) == [name]
    with pytest.raises(hal.BundleError, match="was replaced or removed since it was opened"):
        old.session()


def test_a_folder_that_is_no_bundle_is_not_replaced(model: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    before = files.listing(tmp_path)
    with pytest.raises(hal.BundleError, match="is a folder that is not a bundle"):
        hal.compile(model, target=ROUTE, output=tmp_path / "precious")
    assert files.listing(tmp_path) == before


def test_a_failed_compile_leaves_the_older_bundle_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "mlp.hal"
    hal.compile(model, target=ROUTE, output=output)
    before = files.listing(tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("power cut")

    monkeypatch.setattr("hal.compiler.build_target", fail)
    with pytest.raises(RuntimeError, match="power cut"):
        hal.compile(model, target=ROUTE, output=output)
    assert files.listing(tmp_path) == before
    assert is_right(hal.load(output))


def test_what_a_killed_compile_left_goes_with_the_next_one(model: Path, tmp_path: Path) -> None:
    left = tmp_path / ".mlp.hal.tmp-dead"
    (left / "bundle").mkdir(parents=True)
    foreign = tmp_path / ".other.hal.tmp-dead"
    foreign.mkdir()
    for folder in (left, foreign):
        os.utime(folder, (0, 0))
    with scratch_folder(tmp_path, ".mlp.hal.tmp-") as busy:  # another compile that is running
        assert not left.exists()
        os.utime(busy, (0, 0))
        hal.compile(model, target=ROUTE, output=tmp_path / "mlp.hal", verify=False)
        assert busy.exists()
    assert names_in(tmp_path) == [".other.hal.tmp-dead", "mlp.hal"]
