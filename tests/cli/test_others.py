"""What commands do about builds that others' software has a part in, and about others' files."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import hal
import hal.compiler
import hal.targets
from hal.cli import _worker
from tests.cli.conftest import Hal


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    """All backends count as another package's."""
    monkeypatch.setattr(hal.targets, "foreign_names", lambda names: ["backend 'npu' of kit 1.0"])


def _leave(*_: Any, **__: Any) -> Any:
    os._exit(0)


@pytest.mark.usefixtures("foreign")
@pytest.mark.parametrize(("command", "method"), [("verify", "verify"), ("run", "session")])
def test_a_backend_that_ends_the_process_is_an_error(
    hal_command: Hal, bundle: Path, monkeypatch: pytest.MonkeyPatch, command: str, method: str
) -> None:
    monkeypatch.setattr(hal.Bundle, method, _leave)
    more = ["--random-inputs"] if command == "run" else []
    result = hal_command(command, bundle, *more)
    assert result.code == 2
    assert "backend 'npu' of kit 1.0 ended the process (exit code 0)" in result.err


@pytest.mark.usefixtures("foreign")
def test_what_works_prints_the_same(hal_command: Hal, bundle: Path) -> None:
    result = hal_command("run", bundle, "--random-inputs", "--json")
    assert result.code == 0, result.err
    assert result.json
    assert "verified" in hal_command("verify", bundle).out


def test_builds_that_do_not_run_here_are_told_and_others_verified(
    hal_command: Hal, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = tmp_path / "both.hal"
    targets = ["-t", "host:onnxruntime", "-t", "host:tvm"]
    assert hal_command("compile", model, "-o", both, *targets).code == 0
    monkeypatch.setattr(
        hal.compiler, "cannot_run", lambda r: "no driver" if r.backend == "tvm" else ""
    )
    result = hal_command("verify", both)
    assert result.code == 0, result.err
    assert "host:onnxruntime: verified" in result.out
    assert "host:tvm: not verified: built, not run: no driver" in result.out
    monkeypatch.setattr(hal.compiler, "cannot_run", lambda _: "no driver")
    result = hal_command("verify", both)
    assert result.code == 2
    assert "nothing of the bundle runs here: built, not run: no driver" in result.err


def test_a_page_does_not_take_the_place_of_another_file(
    hal_command: Hal, bundle: Path, tmp_path: Path
) -> None:
    model, page = tmp_path / "model.onnx", tmp_path / "page.html"
    model.write_bytes(b"precious")
    result = hal_command("inspect", bundle, "--html", model)
    assert (result.code, model.read_bytes()) == (2, b"precious")
    assert "exists and is no page" in result.err
    for _ in range(2):  # an earlier page is replaced
        assert hal_command("inspect", bundle, "--html", page).code == 0
    result = hal_command("conformance", "host", "--op", "Relu", "--html", model)
    assert (result.code, model.read_bytes()) == (2, b"precious")
    assert hal_command("inspect", bundle, "--html", tmp_path).code == 2


def test_a_dim_that_is_given_twice_is_refused(hal_command: Hal, bundle: Path) -> None:
    given = ["--dim", "batch=2", "--dim", "batch=3"]
    result = hal_command("run", bundle, "--random-inputs", *given)
    assert result.code == 2
    assert "--dim batch is given twice, 2 and 3" in result.err


def test_a_build_that_fails_when_it_is_measured_is_told_in_a_line(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [
        {"do": "load", "bundle": str(bundle), "target": "host:onnxruntime", "threads": 1},
        {"do": "measure"},
    ]
    monkeypatch.setattr(_worker, "_measure", lambda *_: {}["no such\nkey"])
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{json.dumps(r)}\n" for r in requests)))
    answers: list[dict[str, Any]] = []
    monkeypatch.setattr(_worker, "_send", lambda _, answer: answers.append(answer))
    kept = os.dup(1)
    try:
        assert _worker.main() == 0
    finally:
        os.dup2(kept, 1)
        os.close(kept)
    assert "load_seconds" in answers[0]
    assert answers[1]["error"] == "a build failed: KeyError: 'no such\\nkey'"
    assert "--debug run" in answers[1]["hint"]


@pytest.mark.parametrize(("command", "method"), [("verify", "verify"), ("run", "session")])
def test_a_backend_that_hangs_is_ended_after_the_limit(
    hal_command: Hal, bundle: Path, monkeypatch: pytest.MonkeyPatch, command: str, method: str
) -> None:
    monkeypatch.setattr(hal.Bundle, method, lambda *_, **__: time.sleep(3600))
    more = ["--random-inputs"] if command == "run" else []
    result = hal_command(command, bundle, *more, "--limit", "0.5")
    assert result.code == 2
    assert "ran past the time limit of 0.5 s" in result.err


def test_what_a_plugin_prints_does_not_spoil_json(
    hal_command: Hal, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = hal.Bundle.verify

    def loud(*given: Any, **named: Any) -> Any:
        print("made by Acme")
        return verify(*given, **named)

    monkeypatch.setattr(hal.Bundle, "verify", loud)
    for more in ([], ["--limit", "60"]):  # in this process, and in one of its own
        result = hal_command("verify", bundle, "--json", *more)
        assert result.code == 0, result.err
        assert "host:onnxruntime" in result.json["builds"]
        assert "made by Acme" in result.err


def test_what_libraries_print_beside_python_does_not_spoil_json(bundle: Path) -> None:
    program = (
        "import os, sys, hal; from hal.cli import main\n"
        "load = hal.load\n"
        "hal.load = lambda path: (os.write(1, b'made by Acme'), load(path))[1]\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "verify", str(bundle), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "host:onnxruntime" in json.loads(done.stdout)["builds"]
    assert "made by Acme" in done.stderr


def test_errors_are_json_too(hal_command: Hal, tmp_path: Path) -> None:
    result = hal_command("verify", tmp_path / "none.hal", "--json")
    assert result.code == 2
    assert f"error: {result.json['error']}\nhint: {result.json['hint']}\n" == result.err


def test_several_targets_are_set_up_and_what_is_not_hals_to_install_is_told(
    hal_command: Hal,
) -> None:
    result = hal_command("targets", "setup", "host", "ascend-910b+host")
    assert result.code == 0
    first, second, third = result.out.splitlines()
    assert first == third == "host:onnxruntime: needs nothing"
    assert "runtime, which is yours to install: pip install onnxruntime-cann" in second


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("rk3588+", "NAME+NAME is a model on several chips"),
        ("a,b", "--target for each"),
        ("", "NAME"),
    ],
)
def test_lists_of_targets_that_are_none_get_a_hint(hal_command: Hal, name: str, hint: str) -> None:
    result = hal_command("targets", "show", name)
    assert result.code == 2
    assert hint in result.err.splitlines()[1]
    assert len(result.err) < 300
