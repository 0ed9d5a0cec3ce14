"""``pytest --hal-target``: a target's conformance as tests, run as its vendor runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from hal.conformance import Outcome
from hal.pytest_plugin import problem_of
from tests import files
from tests.conformance.vendor import TARGET, use_vendor

ITEM = "Relu[float32_2x24]"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A vendor's repository with one test of its own, and a model."""
    folder = tmp_path / "repository"
    folder.mkdir()
    files.save_mlp(folder / "mlp.onnx")
    (folder / "test_own.py").write_text("def test_own():\n    pass\n")
    return folder


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    site = str(folder.parent / "site")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", "-v", *options],
        capture_output=True, text=True, cwd=folder, check=False,
        env={**os.environ, "PYTHONPATH": site},
    )  # fmt: skip


def counts(done: subprocess.CompletedProcess[str]) -> dict[str, int]:
    last = done.stdout.strip().splitlines()[-1]
    return {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", last.split(" in ")[0])}


@pytest.mark.parametrize(
    ("mode", "outcome", "words"),
    [
        ("", "PASSED", ""),
        ("picky", "SKIPPED", "no comparisons in hardware"),
        ("wrong", "FAILED", "wrong: verification failed on acme-1:acme"),
        ("half", "FAILED", "wrong dtype: verification failed on acme-1:acme"),
        ("exit", "FAILED", "error: the process died with exit code 3"),
        ("hang", "FAILED", "error: ran past the time limit"),
    ],
)
def test_a_case_is_a_test_that_passes_is_skipped_or_fails(
    repository: Path, monkeypatch: pytest.MonkeyPatch, mode: str, outcome: str, words: str
) -> None:
    use_vendor(monkeypatch, repository.parent, mode)
    done = run(
        repository, "--hal-target", TARGET, "--hal-from-model", "mlp.onnx",
        "--hal-op", "Relu,Add", "--hal-limit", "6" if mode == "hang" else "60",
    )  # fmt: skip
    assert re.search(rf"{TARGET}::{re.escape(ITEM)} {outcome}", done.stdout), done.stdout
    assert words in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert "dims: batch = 2 (default)" in done.stdout
    found = counts(done)
    assert sum(found.values()) == 3  # two cases, and the repository's own test
    if mode not in ("wrong", "half"):  # those do everything wrong
        assert found["passed"] == (3 if mode == "" else 2)
    if mode == "wrong":
        assert "max error 1;" in done.stdout
    assert done.returncode == (1 if outcome == "FAILED" else 0)


def test_what_the_host_ran_fails_unless_it_may(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_vendor(monkeypatch, repository.parent, "picky")
    options = [
        "--hal-target",
        TARGET,
        "--hal-op",
        "Relu",
        "--hal-fallback",
        "-m",
        "hal_conformance",
    ]
    done = run(repository, *options, "-k", "test_relu]")
    assert counts(done)["failed"] == 1
    assert "delegated: the target ran 0% of its nodes, 100% are asked for" in done.stdout
    done = run(repository, *options, "-k", "test_relu]", "--hal-share", "0")
    assert counts(done)["passed"] == 1


def test_figures_go_into_the_report_for_machines(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_vendor(monkeypatch, repository.parent)
    options = ["--hal-from-model", "mlp.onnx", "--hal-op", "Relu", "--hal-dim", "batch=3"]
    run(repository, "--hal-target", TARGET, *options, "--junitxml", "report.xml")
    case = next(
        c for c in ElementTree.parse(repository / "report.xml").iter("testcase")
        if c.get("name") == "Relu[float32_3x24]"
    )  # fmt: skip
    told = {p.get("name"): p.get("value") for p in case.iter("property")}
    assert told["hal_status"] == "passed"
    assert told["hal_share"] == "1.0"
    assert float(told["hal_max_error"] or "nan") < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hal-target", "hots"], "unknown target 'hots' (hint: did you mean 'host'?)"),
        (["--hal-op", "Relu"], "--hal-op is given without --hal-target"),
        (
            ["--hal-target", "host", "--hal-from-model", "mlp.onnx", "--hal-op", "Reluu"],
            "no case is about the op 'Reluu' (hint: did you mean 'Relu'?)",
        ),
        (
            ["--hal-target", "host", "--hal-from-model", "mlp.onnx", "--hal-dim", "batch"],
            "--hal-dim 'batch' is not name=extent",
        ),
        (["--hal-target", "host", "--hal-from-model", "no.onnx"], "no such file or directory"),
    ],
)
def test_options_that_cannot_be_are_told_in_a_line(
    repository: Path, options: list[str], message: str
) -> None:
    done = run(repository, *options)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("ERROR: ")
    assert message in line


def test_whoever_does_not_ask_pays_nothing(repository: Path) -> None:
    heavy = ["torch", "tvm", "onnx", "onnxruntime", "numpy", "pydantic", "hal.conformance"]
    (repository / "test_own.py").write_text(
        "import sys\n\n"
        "def test_light():\n"
        "    assert 'hal.pytest_plugin' in sys.modules\n"
        f"    assert not [name for name in {heavy} if name in sys.modules]\n"
    )
    done = run(repository)
    assert done.returncode == 0, done.stdout
    assert counts(done) == {"passed": 1}


def outcome_of(status: str, share: float | None, error: float | None = None) -> Outcome:
    return Outcome("Relu-a", "Relu", status, "because", "", 0.1, error, share, "2 nodes")


def test_the_least_share_decides_on_what_is_delegated() -> None:
    assert problem_of(outcome_of("passed", 0.75), 0.75) == ""
    assert problem_of(outcome_of("passed", None), 1.0) == ""
    assert problem_of(outcome_of("passed", 0.5, 0.25), 0.75) == (
        "delegated: the target ran 50% of its nodes, 75% are asked for; max error 0.25; 2 nodes"
    )
    assert problem_of(outcome_of("wrong", 1.0, 3.0), 0.0) == (
        "wrong: because; the target ran 100% of its nodes; max error 3; 2 nodes"
    )
