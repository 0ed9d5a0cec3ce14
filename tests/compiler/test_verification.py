"""Every build is compared with the reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import hal
from hal.cli._report import verification_text
from hal.runtime.verification import compare, narrowed_floats
from tests import files
from tests.compiler.support import ROUTE, is_right, names_in, use_vendor


def test_error_figures_of_every_build_are_in_the_manifest(bundle: hal.Bundle) -> None:
    figures = bundle.manifest.builds[ROUTE].verification
    assert figures is not None
    assert figures["passed"] is True
    y = figures["outputs"]["y"]
    assert 0 <= y["mean_error"] <= y["max_error"] <= y["tolerance"] < 0.1
    assert bundle.verify() == {ROUTE: figures}


def test_unverified_builds_say_so(model: Path) -> None:
    compiled = hal.compile(model, target=ROUTE, verify=False)
    assert compiled.manifest.builds[ROUTE].verification is None
    assert compiled.verify()[ROUTE]["passed"]


def test_example_inputs_are_what_a_build_is_verified_on(tmp_path: Path) -> None:
    module = torch.nn.Linear(4, 2).eval()
    example = torch.full((3, 4), 7.0)
    compiled = hal.compile(module, (example,), target=ROUTE, output=tmp_path / "linear")
    assert compiled.manifest.samples is not None
    from safetensors.numpy import load_file

    (kept,) = load_file(compiled.path / compiled.manifest.samples).values()
    assert kept.tolist() == example.tolist()


def test_a_bundle_is_verified_against_another_model(
    bundle: hal.Bundle, model: Path, tmp_path: Path
) -> None:
    assert bundle.verify(against=model)[ROUTE]["passed"]
    with pytest.raises(hal.CheckFailed, match="output 'y': max error"):
        bundle.verify(against=files.save_mlp(tmp_path / "other.onnx", seed=1))


def test_a_wrong_build_fails_and_names_the_first_tensor_that_diverges(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_vendor(monkeypatch, tmp_path, "wrong")
    output = tmp_path / "out" / "mlp.hal"
    output.parent.mkdir()
    with pytest.raises(hal.CheckFailed) as caught:
        hal.compile(model, target="acme-1", output=output)
    text = caught.value.message
    assert "verification failed on acme-1:acme: output 'y': max error" in text
    assert "first diverging tensor is 'r' (Relu, node 'middle')" in text
    assert caught.value.exit_code == 1
    assert names_in(output.parent) == []
    assert hal.compile(model, target="acme-1", output=output, verify=False).path == output


def test_refused_nodes_go_to_the_host_runtime_and_the_plan_says_why(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_vendor(monkeypatch, tmp_path, "picky")
    compiled = hal.compile(model, target="acme-1")
    placement = compiled.manifest.builds["acme-1:acme"].placement
    assert placement["assigned"].keys() == {"acme", "onnxruntime"}
    (refused,) = placement["refused"]
    assert (refused["op"], refused["reason"]) == ("Relu", "no comparisons in hardware")
    assert is_right(compiled)
    with pytest.raises(hal.UnsupportedError) as caught:
        hal.compile(model, target="acme-1", fallback=False)
    assert "Relu (node 'middle'): no comparisons in hardware" in caught.value.message
    assert "fallback" in caught.value.hint


def test_progress_is_told_in_sentences(model: Path) -> None:
    said: list[str] = []
    hal.compile(model, target=ROUTE, progress=said.append)
    assert said[0] == "reading the model"
    assert f"building for {ROUTE}" in said
    assert said[-1] == f"verifying {ROUTE}"


NARROWED = """
[behaviour]
matmul_precision = "float16"
[behaviour.dtypes]
float32 = "narrowed"
"""


def test_a_chip_that_narrows_floats_is_held_to_the_tolerance_of_the_narrow_type(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_vendor(monkeypatch, tmp_path, "wrong")
    with (tmp_path / "acme-1.toml").open("a") as file:
        file.write(NARROWED)
    compiled = hal.compile(model, target="acme-1", output=tmp_path / "mlp.hal")
    record = compiled.manifest.builds["acme-1:acme"]
    figures = record.verification
    assert figures is not None
    assert figures["narrowed"] == {"float32": "float16"}
    sentence = "tolerance of float16, in which the target computes float32"
    assert sentence in verification_text(figures)

    on_host = record.model_copy(deep=True)
    for segment in on_host.segments:
        segment["backend"] = "onnxruntime"
    assert narrowed_floats(on_host) == {}
    narrowed = compiled.narrowed("acme-1:acme")["float32"]
    assert (narrowed.relative, narrowed.absolute) == (2e-2, 1e-2)


def test_a_narrow_tolerance_is_for_the_narrowed_type_alone() -> None:
    right = np.ones(3, np.float32)
    near = right + np.float32(0.01)
    far = right + np.float32(0.1)
    narrowed = {"float32": "float16"}
    assert not compare("y", near, right)["passed"]
    assert compare("y", near, right, 0.0, narrowed)["passed"]
    assert compare("y", [near], [right], 0.0, narrowed)["passed"]
    assert not compare("y", far, right, 0.0, narrowed)["passed"]
    wide = np.ones(3)
    assert not compare("y", wide + 0.01, wide, 0.0, narrowed)["passed"]
    whole = np.ones(3, np.int64)
    assert not compare("y", whole + 1, whole, 0.0, narrowed)["passed"]
