from pathlib import Path

import numpy as np
import pytest

import hal
from tests.cli.conftest import Hal, write_model


def test_compile_prints_placement_verification_and_passes(
    hal_command: Hal, model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.hal"
    result = hal_command("compile", model, "-o", output, "-t", "host:onnxruntime", "--explain")
    assert result.code == 0, result.err
    assert "nodes to onnxruntime (100.0 %)" in result.out
    assert "verified: y max error" in result.out
    assert "weights" in result.out
    assert "fold" in result.out
    assert f"wrote {output}" in result.out


def test_compile_speaks_json(hal_command: Hal, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.hal"
    result = hal_command("compile", model, "-o", output, "-t", "host:onnxruntime", "--json")
    report = result.json
    assert report["bundle"] == str(output)
    assert report["builds"]["host:onnxruntime"]["verification"]["passed"] is True
    assert {"name", "matches", "nodes_before", "nodes_after", "bytes_before", "seconds"} <= set(
        report["passes"][0]
    )


def test_compile_without_verification_says_so(
    hal_command: Hal, model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "folder"
    result = hal_command("compile", model, "-o", output, "--no-verify")
    assert "not verified: not asked for" in result.out
    assert output.is_dir()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch.onnx"], "error: no such file or directory: nosuch.onnx"),
        (["MODEL", "-t", "hots"], "error: unknown target 'hots'"),
        (["MODEL", "--input", "x"], "error: --input 'x' is not name:dtype:dims"),
        (["MODEL", "--dynamic", "x"], "error: --dynamic 'x' is not name:axis=symbol"),
    ],
)
def test_a_compile_that_fails_leaves_nothing_behind(
    hal_command: Hal, model: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    given = [str(model) if a == "MODEL" else a for a in arguments]
    result = hal_command("compile", *given, "-o", tmp_path / "out.hal")
    assert result.code == 2
    assert result.err.startswith(message)
    assert "hint: " in result.err
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_compile_leaves_nothing_behind(
    hal_command: Hal, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hal.compiler.build_target", interrupt)
    result = hal_command("compile", model, "-o", tmp_path / "out.hal")
    assert result.code == 2
    assert result.err.startswith("error: interrupted\nhint: ")
    assert list(tmp_path.iterdir()) == []


def test_run_on_random_inputs_is_the_same_for_the_same_seed(hal_command: Hal, bundle: Path) -> None:
    first = hal_command("run", bundle, "--random-inputs", "--seed", 1, "--json").json
    again = hal_command("run", bundle, "--random-inputs", "--seed", 1, "--json").json
    other = hal_command("run", bundle, "--random-inputs", "--seed", 2, "--json").json
    assert first == again
    assert first["outputs"][0]["sha256"] != other["outputs"][0]["sha256"]
    assert first["outputs"][0]["name"] == "y"


def test_run_reads_and_writes_arrays(hal_command: Hal, bundle: Path, tmp_path: Path) -> None:
    x = np.arange(16, dtype=np.float32).reshape(2, 8)
    np.save(tmp_path / "x.npy", x)
    output = tmp_path / "out.npz"
    result = hal_command("run", bundle, "--input", f"x={tmp_path / 'x.npy'}", "-o", output)
    assert result.code == 0, result.err
    assert "[2, 4]" in result.out
    with hal.load(bundle).session() as session, np.load(output) as written:
        np.testing.assert_array_equal(written["y"], session(x))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.npz", "x.npy"]


def test_run_gives_dynamic_dims_the_asked_extents(hal_command: Hal, bundle: Path) -> None:
    result = hal_command("run", bundle, "--random-inputs", "--dim", "batch=7", "--json")
    assert result.json["outputs"][0]["shape"] == [7, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is nothing to run on"),
        (["--input", "x=nosuch.npy"], "--input x: no such file: nosuch.npy"),
        (["--input", "x"], "--input 'x' is not name=file.npy"),
        (["--input", f"x={__file__}"], "is no .npy file"),
        (["--random-inputs", "-t", "host:tvm"], "the bundle has no build for 'host:tvm'"),
        (["--random-inputs", "-o", "/nosuch/out.npz"], "cannot write /nosuch/out.npz"),
        (["--prompt", "Hello"], "the bundle's task is 'generic', not 'causal-lm'"),
    ],
)
def test_run_names_what_is_wrong(
    hal_command: Hal, bundle: Path, arguments: list[str], message: str
) -> None:
    result = hal_command("run", bundle, *arguments)
    assert result.code == 2
    assert message in result.err
    assert "hint: " in result.err


def test_run_names_a_wrong_input(hal_command: Hal, bundle: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 8), np.float64))
    wrong_name = hal_command("run", bundle, "--input", f"z={tmp_path / 'x.npy'}")
    wrong_dtype = hal_command("run", bundle, "--input", f"x={tmp_path / 'x.npy'}")
    assert "there is no input 'z'" in wrong_name.err
    assert "did you mean 'x'?" in wrong_name.err or "known: x" in wrong_name.err
    assert "input 'x' has dtype float64, expected float32" in wrong_dtype.err
    assert (wrong_name.code, wrong_dtype.code) == (2, 2)


def test_verify_compares_with_the_reference_and_with_a_model(
    hal_command: Hal, bundle: Path, model: Path
) -> None:
    assert "host:onnxruntime: verified: y max error" in hal_command("verify", bundle).out
    report = hal_command("verify", bundle, "--against", model, "--json").json
    assert report["builds"]["host:onnxruntime"]["passed"] is True


def test_verify_against_another_model_fails_with_code_1(
    hal_command: Hal, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed=None: real(7 if seed == 0 else seed))
    other = write_model(tmp_path / "other.onnx")
    monkeypatch.undo()
    result = hal_command("verify", bundle, "--against", other)
    assert result.code == 1
    assert result.err.startswith("error: verification failed on host:onnxruntime: output 'y'")


def test_inspect_shows_a_bundle_and_a_model_alike(
    hal_command: Hal, bundle: Path, model: Path
) -> None:
    text = hal_command("inspect", bundle, "--explain").out
    assert "[batch, 8]" in text
    assert "host:onnxruntime: assigned" in text
    of_bundle = hal_command("inspect", bundle, "--json").json
    of_model = hal_command("inspect", model, "--json").json
    assert of_bundle["inputs"] == of_model["inputs"]
    assert of_model["ops"]["MatMul"] == 1
    assert of_bundle["weight_bytes"] >= 4 * (8 * 4 + 4)


def test_retarget_builds_for_another_target(hal_command: Hal, bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "other.hal"
    result = hal_command("retarget", bundle, "-t", "x86-64:onnxruntime", "-o", output, "--json")
    assert result.code == 0, result.err
    assert list(result.json["builds"]) == ["x86-64:onnxruntime"]
    assert hal_command("run", output, "--random-inputs").code == 0


@pytest.mark.parametrize("command", ["run", "verify", "inspect", "bench"])
def test_a_damaged_bundle_is_refused_by_every_command(
    hal_command: Hal, bundle: Path, tmp_path: Path, command: str
) -> None:
    damaged = tmp_path / "damaged.hal"
    data = bytearray(bundle.read_bytes())
    place = data.index(b'"format"')
    data[place + 1] ^= 1
    damaged.write_bytes(data)
    result = hal_command(command, damaged, *(["--random-inputs"] if command == "run" else []))
    assert result.code == 2
    assert result.err.startswith("error: ")
    assert "Traceback" not in result.err


def test_bench_measures_every_target_in_turns(hal_command: Hal, bundle: Path) -> None:
    arguments = ["--rounds", 2, "--runs", 3, "--warmup", 1, "--threads", 1, "--json"]
    target = ["-t", "host:onnxruntime"]
    report = hal_command("bench", bundle, *target, *target, *arguments).json
    assert [t["target"] for t in report["targets"]] == ["host:onnxruntime"] * 2
    for figures in report["targets"]:
        assert figures["runs"] == 6
        assert 0 < figures["latency_seconds"]["min"] <= figures["latency_seconds"]["p50"]
        assert figures["latency_seconds"]["p50"] <= figures["latency_seconds"]["p99"]
        assert figures["peak_memory_bytes"] > 0
        assert figures["load_seconds"] > 0
    assert report["machine"]["threads"] == 1
    assert "onnxruntime" in report["versions"]


def test_bench_names_a_build_that_is_not_there(hal_command: Hal, bundle: Path) -> None:
    result = hal_command("bench", bundle, "-t", "host:tvm")
    assert result.code == 2
    assert "the bundle has no build for 'host:tvm'" in result.err


def test_targets_are_listed_shown_and_checked(hal_command: Hal, tmp_path: Path) -> None:
    listed = hal_command("targets", "list", "--json").json
    assert listed["targets"][0]["name"] == "host"
    shown = hal_command("targets", "show", "x86-64-v4").out
    assert "512 bits" in shown
    assert "conflicting" in shown
    described = hal_command("targets", "show", "host:tvm", "--json").json
    assert described["target"] == "host:tvm"
    assert "properties" in hal_command("targets", "schema").json
    file = tmp_path / "mine.toml"
    file.write_text('schema = 1\nname = "mine"\nextends = "x86-64"\ncores = 8\n')
    assert hal_command("targets", "validate", file).out == f"{file}: ok, describes 'mine'\n"
    file.write_text('schema = 1\nname = "mine"\nextends = "x86-64"\ncroes = 8\n')
    result = hal_command("targets", "validate", file)
    assert result.code == 2
    assert result.err == f"error: {file}: unknown field 'croes'\nhint: did you mean 'cores'?\n"


def test_targets_that_cannot_be_used_are_listed_with_the_reason(
    hal_command: Hal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.toml").write_text("name = ")
    monkeypatch.setenv("HAL_TARGET_PATH", str(tmp_path))
    result = hal_command("targets", "list")
    assert result.code == 0
    assert "cannot be used: broken (HAL_TARGET_PATH)" in result.out


def test_a_callable_is_compiled_with_inputs_from_the_command_line(
    hal_command: Hal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some_model.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Linear(4, 3)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    output = tmp_path / "out.hal"
    arguments = ["-t", "host:onnxruntime", "--input", "input:float32:batch,4"]
    result = hal_command("compile", "python:some_model:make", "-o", output, *arguments)
    assert result.code == 0, result.err
    random = hal_command("run", output, "--random-inputs", "--dim", "batch=5", "--json").json
    assert random["outputs"][0]["shape"] == [5, 3]
