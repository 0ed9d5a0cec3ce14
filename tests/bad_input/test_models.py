"""Models that cannot be read, exported or run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import pytest

import hal
from hal.cli import main
from tests import files, models
from tests.bad_input.cases import ROUTE, Case, cases, check_cli, check_text


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


def saved(*, tokenizer: str | None = None, **config: Any) -> Callable[[Path], Path]:
    """A small language model whose config is changed after it was saved, and its tokenizer."""

    def make(folder: Path) -> Path:
        path = models.save("llama", folder, num_hidden_layers=1)
        changed = json.loads((path / "config.json").read_text()) | config
        (path / "config.json").write_text(json.dumps(changed))
        if tokenizer is not None:
            (path / "tokenizer.json").write_text(tokenizer)
        return path

    return make


def onnx_text(text: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        model = f'<ir_version: 8, opset_import: ["": 17]> g {text}'
        onnx.save_model(onnx.parser.parse_model(model), folder / "model.onnx")
        return folder / "model.onnx"

    return make


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


def failing_module(folder: Path) -> str:
    (folder / "module_that_fails.py").write_text("raise ValueError('too early')\n")
    sys.path.insert(0, str(folder))
    return "python:module_that_fails:f"


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
        "weights that do not fit the config",
        hal.ModelError,
        saved(vocab_size=999),
        ("do not fit config.json: 'lm_head.weight' is [256, ", "and [999, ", "embed_tokens"),
        "another config.json",
    ),
    Case(
        "config with a wrong value",
        hal.ModelError,
        saved(hidden_size="wide"),
        ("config.json does not configure LlamaForCausalLM", "hidden_size"),
        "correct it",
    ),
    Case(
        "damaged tokenizer",
        hal.ModelError,
        saved(tokenizer='{"version": "1.0", "trunc'),
        ("tokenizer.json is not valid JSON",),
        "again",
    ),
    Case(
        "tokenizer that is none",
        hal.ModelError,
        saved(tokenizer='{"version": "1.0"}'),
        ("tokenizer.json is not a tokenizer",),
        "again",
    ),
    Case(
        "folder with the name of a file",
        hal.ModelError,
        lambda folder: (folder / "m.onnx").mkdir() or folder / "m.onnx",
        ("m.onnx is a folder, not a .onnx file",),
        "path of the .onnx file",
    ),
    Case(
        "value defined by two nodes",
        hal.ModelError,
        onnx_text("(float[4] x) => (float[4] y) { t = Neg (x) t = Abs (x) y = Neg (t) }"),
        ("value 't' is defined twice: by node 0 (Neg) and by node 1 (Abs)",),
        "unique",
    ),
    *(
        Case(
            f"mixed dtypes on {target}",
            hal.GraphError,
            onnx_text("(float[2,2] a, double[2,2] b) => (float[2,2] y) { y = MatMul (a, b) }"),
            ("(MatMul) takes inputs of one type, but 'a' is float32 and 'b' is float64",),
            "not valid ONNX",
            target,
        )
        for target in (ROUTE, "host:tvm")
    ),
    Case(
        "value defined by an input and a node",
        hal.ModelError,
        onnx_text("(float[4] x) => (float[4] y) { x = Neg (x) y = Neg (x) }"),
        ("value 'x' is defined twice: by an input and by node 0 (Neg)",),
        "unique",
    ),
    Case("empty path", hal.ModelError, lambda _: "", ("the path of the model is empty",), "pass a"),
    *(
        Case(
            f"callable that {what}",
            hal.ModelError,
            lambda _, name=name: f"python:{name}",
            (f"python:{name} {says}",),
            "returns a torch.nn.Module, or (module, inputs)",
        )
        for what, name, says in (
            ("takes arguments", "json:dumps", "failed: TypeError: dumps() missing 1 required"),
            ("returns text", "os:getcwd", "returned a str"),
            ("returns a pair of numbers", "os:times", "returned a times_result"),
            ("is none", "math:pi", "is a float, which cannot be called"),
        )
    ),
    Case(
        "module that fails",
        hal.ModelError,
        failing_module,
        ("cannot import module 'module_that_fails': ValueError: too early",),
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


def test_libraries_add_no_lines_of_their_own_on_the_command_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["compile", str(invalid_graph(tmp_path)), "-o", str(tmp_path / "m.hal")]) == 2
    assert not caplog.records
