"""Which frontend a source goes to."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import onnx
import onnx.parser
import pytest
import torch

from hal import MissingExtraError, ModelError, frontends

MODULE = """
import torch

def make():
    return torch.nn.Linear(4, 3), (torch.zeros(1, 4),), {"input": {0: "batch"}}
"""


def test_a_callable_gives_module_inputs_and_dynamic_dims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made_for_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    loaded = frontends.load("python:made_for_test:make")
    assert loaded.source == "python:made_for_test:make"
    assert loaded.graph.signature().inputs[0].dims == ("batch", 4)


def test_a_callable_that_cannot_be_found_is_named() -> None:
    with pytest.raises(ModelError, match="cannot import module 'no_such_module'"):
        frontends.load("python:no_such_module:make")
    with pytest.raises(ModelError, match="module 'math' has no 'make'"):
        frontends.load("python:math:make")
    with pytest.raises(ModelError, match="is not python:module:callable"):
        frontends.load("python:math")


def test_an_onnx_file_needs_no_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = '<ir_version: 8, opset_import: ["": 20]> g (float[4] x) => (float[4] y) { y = Neg (x) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert frontends.load(tmp_path / "m.onnx").source == str(tmp_path / "m.onnx")


def test_a_missing_library_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.pt2").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="optional dependency group 'torch'"):
        frontends.load(tmp_path / "m.pt2")
    with pytest.raises(MissingExtraError, match="optional dependency group 'hf'"):
        frontends.load(tmp_path)


def test_sources_of_no_known_kind_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.gguf").touch()
    with pytest.raises(ModelError, match=r"m\.gguf is of no known kind"):
        frontends.load(tmp_path / "m.gguf")
    with pytest.raises(ModelError, match="no such file or directory"):
        frontends.load(tmp_path / "none")
    with pytest.raises(ModelError, match="cannot load a int"):
        frontends.load(3)
    monkeypatch.delitem(sys.modules, "torch")
    with pytest.raises(ModelError, match="cannot load a Linear"):
        frontends.load(torch.nn.Linear(1, 1))
