"""``--kv-cache`` on the command line, and how what was chosen is shown."""

from pathlib import Path

import onnx_ir as ir
import pytest

import hal
from hal.ir import Graph
from tests.cli.conftest import Hal, write_model
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


def test_retarget_changes_how_the_cache_is_carried_but_not_what(
    hal_command: Hal, tmp_path: Path
) -> None:
    model, bundle = written(toys.plain(rope=True), tmp_path), tmp_path / "d.hal"
    start = ("-t", "host:onnxruntime", "--no-verify", "-o")
    assert hal_command("compile", model, *start, bundle).code == 0
    other = tmp_path / "other.hal"
    result = hal_command("retarget", bundle, *start, other, "--kv-cache", "paged,int8")
    assert result.code == 0, result.err
    build = hal.load(other).manifest.builds["host:onnxruntime"]
    assert (build.cache["layout"], build.cache["bits"]) == ("paged", 8)
    # Its attention reads contiguous floats only, and the build says what that costs.
    notes = " ".join(note for s in build.segments for note in s["record"]["notes"])
    assert "each step gathers the cache" in notes
    for words, message in (("latent", "was decided when it was compiled"), ("", "unknown value")):
        result = hal_command("retarget", bundle, *start, other, "--kv-cache", words)
        assert result.code == 2
        assert message in result.err


@pytest.mark.parametrize("words", ["paged", "int8", "contiguous"])
def test_a_model_without_a_cache_has_no_layout_of_it(
    hal_command: Hal, bundle: Path, tmp_path: Path, words: str
) -> None:
    model, output = write_model(tmp_path / "m.onnx"), tmp_path / "o.hal"
    rest = ("-t", "host:onnxruntime", "-o", output, "--kv-cache", words)
    for command in (("compile", model), ("retarget", bundle)):
        result = hal_command(*command, *rest)
        assert result.code == 2
        assert "the model carries no cache" in result.err
        assert not output.exists()


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
