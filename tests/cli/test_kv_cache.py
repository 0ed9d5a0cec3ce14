"""``--kv-cache`` on the command line, and how what was chosen is shown."""

from pathlib import Path

import onnx_ir as ir
import pytest

from hal.ir import Graph
from tests.cli.conftest import Hal
from tests.passes import cache_toys as toys


def written(graph: Graph, folder: Path) -> Path:
    path = folder / "decoder.onnx"
    path.write_bytes(ir.to_proto(graph.stamp()).SerializeToString())
    return path


def test_inspect_and_explain_show_what_is_carried_and_what_else_was_possible(
    hal_command: Hal, tmp_path: Path
) -> None:
    model, bundle = written(toys.latent("operands"), tmp_path), tmp_path / "d.hal"
    arguments = ("compile", model, "-o", bundle, "-t", "host:onnxruntime", "--no-verify")
    compiled = hal_command(*arguments, "--kv-cache", "latent", "--explain")
    assert compiled.code == 0, compiled.err
    text = " ".join(compiled.out.split())
    assert "320 exported" in text
    assert "64 carried" in text
    shown = " ".join(hal_command("inspect", bundle).out.split())
    assert "what is carried per token of one sequence" in shown
    assert "0.latent" in shown
    found = hal_command("inspect", bundle, "--json").json["cache"]["layers"]
    assert [(x["form"], x["bytes"], x["bytes_exported"]) for x in found] == [("latent", 64, 320)]
    assert [c["op"] for c in found[0]["cut"]] == ["Reshape", "RotaryEmbedding"]
    assert {o["form"]: o["bytes"] for o in found[0]["alternatives"]}["expanded"] == 320


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        ("latnt", "unknown value 'latnt'", "did you mean 'latent'?"),
        ("paged,contiguous", "asks for both 'contiguous' and 'paged'", "choose one"),
        ("latent", "finds no cut that carries less than the keys and values", "kv_cache='auto'"),
    ],
)
def test_a_cache_that_cannot_be_had_is_an_error(
    words: str, message: str, hint: str, hal_command: Hal, tmp_path: Path
) -> None:
    model, bundle = written(toys.plain(rope=True), tmp_path), tmp_path / "d.hal"
    arguments = ("compile", model, "-o", bundle, "-t", "host:onnxruntime", "--no-verify")
    found = hal_command(*arguments, "--kv-cache", words)
    assert found.code == 2
    assert message in found.err
    assert hint in found.err
    assert not bundle.exists()
