"""The example of a vendor's package in an environment of its own passes its own conformance."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.targets.test_vendor_plugin import EXAMPLE, ROOT

PARTS = (
    "hal", "passes", "targets", "kernels", "examples/demo_model",
    "pyproject.toml", "README.md", "LICENSE",
)  # fmt: skip
COMPILE = """
import sys
from pathlib import Path
import hal
from hal.conformance import model_cases
(case,) = (c for c in model_cases() if c.name == "cnn-int8")
hal.compile(case.write(Path()), target="tiny-npu", output="cnn.hal", **case.options)
"""

pytestmark = pytest.mark.slow


def copy_of(folder: Path) -> Path:
    """The sources of hal without what builds and test runs leave beside them."""
    for part in PARTS:
        source, goal = ROOT / part, folder / part
        goal.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, goal, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, goal)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``venv``, where wheels of hal and of the package are installed, and with a copy
    of the package's own repository. Dependencies are those of the running interpreter."""
    folder = tmp_path_factory.mktemp("vendor")
    shutil.copytree(EXAMPLE, folder / "package", ignore=shutil.ignore_patterns("__pycache__"))
    sources = [copy_of(folder / "hal-sources"), folder / "package"]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    wheels = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "wheels"]
    subprocess.run([*wheels, *map(str, sources)], check=True, cwd=folder)
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    built = [str(path) for path in (folder / "wheels").glob("*.whl")]
    install = ["--python", str(venv / "bin" / "python"), "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, *install, "--no-index", *built], check=True, cwd=folder)
    # Only now, so that the hal of the running interpreter is in nobody's way.
    (site,) = venv.glob("lib/python*/site-packages")
    heavy = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "dependencies.pth").write_text("\n".join(heavy) + "\n")
    return folder


def run(place: Path, *command: str, within: str = "") -> subprocess.CompletedProcess[str]:
    """Run a program of the environment, which sees nothing of the repository of hal."""
    dropped = ("PYTHONPATH", "HAL_TARGET_PATH", "TINY_NPU_FAULT")
    environment = {k: v for k, v in os.environ.items() if k not in dropped}
    environment["HAL_CACHE"] = str(place / "cache")
    program = str(place / "venv" / "bin" / command[0])
    return subprocess.run(
        [program, *command[1:]], capture_output=True, text=True, check=False,
        cwd=place / within, env=environment,
    )  # fmt: skip


@pytest.fixture(scope="module")
def bundle(place: Path) -> str:
    """A bundle of an 8-bit network, made in the environment."""
    done = run(place, "python", "-c", COMPILE)
    assert done.returncode == 0, done.stderr
    return str(place / "cnn.hal")


def test_hal_and_the_package_are_those_of_the_environment(place: Path) -> None:
    code = "import hal, hal.passes, hal.targets, tiny_npu\n"
    code += "for m in (hal, hal.passes, hal.targets, tiny_npu): print(m.__file__)"
    done = run(place, "python", "-c", code)
    assert done.returncode == 0, done.stderr
    for file in done.stdout.split():
        assert Path(file).is_relative_to(place / "venv"), file


def test_the_command_finds_nothing_wrong_in_all_of_the_suite(place: Path) -> None:
    done = run(place, "hal", "conformance", "tiny-npu", "--jobs", "2", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["target"] == "tiny-npu:tiny"
    assert report["cases"] > 1500
    assert report["passed"] + report["unsupported"] == report["cases"]
    assert report["per_op"]["QuantizeLinear"]["passed"] >= 1
    assert report["per_op"]["DequantizeLinear"]["passed"] >= 1
    refused = [o for o in report["outcomes"] if o["status"] == "unsupported"]
    assert all(o["reason"] for o in refused)
    assert all(o["share"] == 1.0 for o in report["outcomes"] if o["status"] == "passed")


def test_the_ops_of_an_8_bit_network_run_on_the_chip(place: Path, bundle: str) -> None:
    done = run(place, "hal", "conformance", "tiny-npu", "--from-model", bundle, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["per_op"]["Conv"] == {"passed": 4}
    assert all(o["share"] == 1.0 for o in report["outcomes"] if o["op"] == "Conv")
    assert report["wrong"] + report["wrong dtype"] + report["error"] == 0


def test_its_tests_and_its_conformance_are_one_run_of_pytest(place: Path, bundle: str) -> None:
    done = run(place, "python", "-m", "pytest", "-v", "-p", "no:cacheprovider", within="package")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "test_an_8_bit_network_runs_on_the_chip PASSED" in done.stdout
    assert re.search(r"tiny-npu::QuantizeLinear\[test_quantizelinear\] PASSED", done.stdout)
    assert re.search(r"tiny-npu::Relu\[test_relu\] SKIPPED", done.stdout)
    chosen = ["--hal-target", "tiny-npu", "--hal-from-model", bundle, "-o", "addopts="]
    done = run(place, "python", "-m", "pytest", "-v", *chosen, within="package")
    assert done.returncode == 0, done.stdout[-3000:]
    assert len(re.findall(r"tiny-npu::Conv\[.*\] PASSED", done.stdout)) == 4
