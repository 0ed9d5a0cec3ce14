"""``--quantize`` and what belongs to it, on the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import hal
from tests.cli.conftest import Hal
from tests.passes.quantize.toy import language_model


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    path = tmp_path / "toy.onnx"
    path.write_bytes(ir.to_proto(language_model().stamp()).SerializeToString())
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.npz"
    np.savez(path, ids=np.random.default_rng(0).integers(0, 96, (4, 24)))
    return path


def test_compile_and_inspect_show_formats_error_and_figures(
    hal_command: Hal, toy: Path, data: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "q.hal"
    options = ("-t", "host:onnxruntime", "--quantize", "w4a16:gptq", "--calibration", data)
    result = hal_command("compile", toy, "-o", bundle, *options, "--explain")
    assert result.code == 0, result.err
    shown = " ".join(result.out.split())
    for words in (
        "w4a16-g32",
        "gptq",
        "bits per weight",
        "cosine",
        "dB",
        "chooses what is computed",
    ):
        assert words in shown
    assert "w8a16-g32" in " ".join(hal_command("inspect", bundle).out.split())
    facts = hal_command("inspect", bundle, "--json").json["quantization"]
    assert {layer["format"] for layer in facts["layers"]} == {"w4a16-g32", "w8a16-g32", "float"}
    assert facts["figures"]["cosine"] > 0.95


def test_a_model_without_a_residual_stream_says_so(
    hal_command: Hal, toy: Path, tmp_path: Path
) -> None:
    options = ("-t", "host:onnxruntime", "--quantize", "w4a16+rotate", "--no-verify")
    result = hal_command("compile", toy, "-o", tmp_path / "q.hal", *options)
    assert result.code == 0, result.err
    assert "residual streams turned: none: no norms" in " ".join(result.out.split())


def test_a_plan_is_saved_edited_and_used_again(
    hal_command: Hal, toy: Path, data: Path, tmp_path: Path
) -> None:
    plan, bundle = tmp_path / "plan.toml", tmp_path / "q.hal"
    options = ("-t", "host:onnxruntime", "--no-verify", "-o", bundle, "--quantize")
    budget = ("--calibration", data, "--accuracy-budget", "cosine>=0.99", "--save-plan", plan)
    assert hal_command("compile", toy, *options, "w2a16", *budget).code == 0
    assert hal.load(bundle).manifest.metadata["quantization"]["figures"]["cosine"] >= 0.99
    plan.write_text(plan.read_text().replace('"first" = ', '"frist" = '))
    bundle.unlink()
    result = hal_command("compile", toy, *options, plan)
    assert result.code == 2
    assert "did you mean 'first'" in result.err
    plan.write_text('recipe = "w8a16"\n[layers]\nfirst = "float"\n')
    assert hal_command("compile", toy, *options, plan).code == 0


def test_a_plan_of_floats_is_saved_too(
    hal_command: Hal, toy: Path, data: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.toml"
    options = ("-t", "host:onnxruntime", "--no-verify", "-o", tmp_path / "q.hal", "-q", "w2a16")
    budget = ("--calibration", data, "--size-budget", "1GB", "--save-plan", plan)
    result = hal_command("compile", toy, *options, *budget)
    assert result.code == 0, result.err
    assert plan.read_text() == 'recipe = "float"\n'


def test_codes_that_are_stored_wider_are_told(hal_command: Hal, toy: Path, tmp_path: Path) -> None:
    options = ("-t", "host:onnxruntime", "-o", tmp_path / "q.hal", "--quantize", "w3a16")
    result = hal_command("compile", toy, *options)
    assert "3-bit codes in 4 bits" in result.out
    assert "note: host:onnxruntime: reads " in result.err


def test_what_a_target_gains_is_in_the_report(hal_command: Hal, toy: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "q.hal"
    options = ("-t", "host:onnxruntime", "-o", bundle, "--no-verify", "--quantize")
    facts = hal_command("compile", toy, *options, "w4a16", "--json").json
    (expected,) = facts["quantization"]["outlook"]
    read = facts["builds"]["host:onnxruntime"]["bytes_read"]
    assert read == pytest.approx(expected["bytes"], rel=0.02)
    assert read < expected["float_bytes"] / 2
    shown = hal_command("inspect", bundle)
    assert "times faster where memory is the limit" in shown.out
    bundle.unlink()
    result = hal_command("compile", toy, *options, "fp8")
    assert "(linear, head) has no kernel of its own, no gain expected from it" in result.err
    assert "no gain in speed expected" in result.out


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--quantize", "w5"), 2, "no weight format"),
        (("--quantize", "w4a16-g48"), 2, "group of 48"),
        (("--quantize", "w4a16:gptq"), 2, "--calibration"),
        (("--quantize", "w4a16", "--accuracy-budget", "kl<<1"), 2, "does not parse"),
        (("--quantize", "w4a16", "--calibration", "gone.npz"), 2, "gone.npz"),
        (("--quantize", "gone.toml"), 2, "gone.toml"),
        (("--accuracy-budget", "kl<=1"), 2, "nothing is to be quantized"),
        (("--save-plan", "p.toml"), 2, "--quantize"),
        (("--quantize", "w8a16", "--calibration", "DATA", "--size-budget", "9kB"), 1, "at the least"),
        (("--quantize", "w4a16", "--calibration", "DATA", "--accuracy-budget", "kl<=1"), 2, "'kl'"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_in_two_lines(
    hal_command: Hal, toy: Path, data: Path, tmp_path: Path, options: tuple[str, ...], code: int,
    words: str,
) -> None:  # fmt: skip
    given = [data if word == "DATA" else word for word in options]
    output = tmp_path / "q.hal"
    result = hal_command("compile", toy, "-t", "host:onnxruntime", "-o", output, *given)
    assert result.code == code, result.err
    assert words in " ".join(result.err.split())
    assert "hint:" in result.err
    assert not output.exists()
