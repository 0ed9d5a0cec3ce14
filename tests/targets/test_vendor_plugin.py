"""The example of a vendor's package: installed, it passes; misbehaving, it is survived and told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "vendor_plugin"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as pip installs it, metadata included."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(folder), str(EXAMPLE)], check=True)
    return folder


def run(installed: Path, *command: str, fault: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed), "TINY_NPU_FAULT": fault}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment,
        cwd=installed, check=False,
    )  # fmt: skip


def conformance(installed: Path, fault: str) -> tuple[int, list[dict[str, Any]], str]:
    done = run(
        installed, "-m", "hal.cli", "conformance", "tiny-npu", "--op", "Relu,DequantizeLinear",
        "--limit", "10", "--json", fault=fault,
    )  # fmt: skip
    return done.returncode, json.loads(done.stdout)["outcomes"], done.stderr


def test_its_own_tests_pass(installed: Path) -> None:
    done = run(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLE / "tests"))
    assert done.returncode == 0, done.stdout[-3000:]


def test_it_is_listed(installed: Path) -> None:
    done = run(installed, "-m", "hal.cli", "targets", "list", "--probe", "--json")
    listed = json.loads(done.stdout)
    assert "tiny-npu" in [t["name"] for t in listed["targets"]]
    (mine,) = (b for b in listed["backends"] if b["name"] == "tiny_npu")
    assert mine["status"] == "simulator"


@pytest.mark.parametrize(("fault", "words"), [("probe", "bad mood"), ("api", "hal_api '99'")])
def test_a_package_that_cannot_be_used_is_told_and_hides_nobody(
    installed: Path, fault: str, words: str
) -> None:
    listed = json.loads(
        run(installed, "-m", "hal.cli", "targets", "list", "--probe", "--json", fault=fault).stdout
    )
    status = {b["name"]: b for b in listed["backends"]}
    assert status["tiny_npu"]["status"] == "broken"
    assert words in status["tiny_npu"]["reason"]
    assert status["onnxruntime"]["status"] == "present"


def test_conformance_of_a_good_package(installed: Path) -> None:
    code, outcomes, _ = conformance(installed, "")
    assert code == 0
    assert {o["status"] for o in outcomes} == {"passed", "unsupported"}


@pytest.mark.parametrize(
    ("fault", "words"),
    [("lie", "no such operation"), ("crash", "exit code -11"), ("hang", "time limit")],
)
def test_conformance_survives_and_tells(installed: Path, fault: str, words: str) -> None:
    code, outcomes, stderr = conformance(installed, fault)
    assert code == 1
    assert "Traceback" not in stderr
    failed = [o for o in outcomes if o["status"] == "error"]
    assert failed
    assert any(words in o["reason"] for o in failed)
