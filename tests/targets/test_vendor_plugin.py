"""The example of a vendor's package: installed, it passes; misbehaving, it is survived and told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests import files

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


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("probe", "RuntimeError: the driver is in a bad mood"),
        ("probe-crash", "backend 'tiny_npu' of hal-tiny-npu 1.0 ended the process (SIGSEGV)"),
        ("api", "was written for hal_api '99', this hal speaks '1'"),
    ],
)
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
    assert "tiny-npu" in [t["name"] for t in listed["targets"]]


def eight_bit_model(folder: Path) -> Path:
    """A Relu between 8-bit tensors, all of which the chip takes."""
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "scale"], ["wide"]),
        helper.make_node("Relu", ["wide"], ["positive"]),
        helper.make_node("QuantizeLinear", ["positive", "scale"], ["y"], output_dtype=3),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.INT8, [1, 8]) for name in "xy"]
    scale = numpy_helper.from_array(np.array(0.1, np.float32), "scale")
    graph = helper.make_graph(nodes, "model", ends[:1], ends[1:], [scale])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


SURVIVED = [
    ("api", "error: backend 'tiny_npu' of hal-tiny-npu 1.0 was written for hal_api '99'"),
    ("probe", "error: backend 'tiny_npu' of hal-tiny-npu 1.0 failed when asked whether it can run"),
    ("probe-crash", "error: backend 'tiny_npu' of hal-tiny-npu 1.0 ended the process (SIGSEGV)"),
    (
        "lie",
        "error: backend 'tiny_npu' of hal-tiny-npu 1.0 claimed what it cannot build: the compiler "
        "of tiny-npu: no such operation",
    ),
    ("raise", "error: backend 'tiny_npu' of hal-tiny-npu 1.0 failed when building: KeyError"),
    ("crash", "ended the process (SIGSEGV) while building for tiny-npu:tiny"),
    ("exit", "ended the process (exit code 3) while building for tiny-npu:tiny"),
    ("hang", "ran past the time limit of 8 s while building for tiny-npu:tiny"),
]


@pytest.mark.parametrize(("fault", "words"), SURVIVED)
def test_compile_survives_and_tells(
    installed: Path, tmp_path: Path, fault: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HAL_CACHE", str(tmp_path / "cache"))
    model = eight_bit_model(tmp_path)
    goal = tmp_path / "out"
    goal.mkdir()
    command = ["-m", "hal.cli", "compile", str(model), "-o", str(goal / "m.hal")]
    limit = ["--limit", "8"] if fault == "hang" else []
    done = run(installed, *command, "--target", "tiny-npu", *limit, fault=fault)
    assert done.returncode == 2, done.stderr
    told = done.stderr.strip().splitlines()
    assert len(told) == 2
    assert words in told[0]
    assert told[1].startswith("hint: ")
    assert list(goal.iterdir()) == []
    done = run(installed, *command, "--target", "tiny-npu", "--target", "host:onnxruntime")
    assert done.returncode == 0, done.stderr
    assert "assigned 3/3 nodes to tiny_npu" in done.stdout


def test_a_descriptor_that_promises_more_than_its_backend_does(
    installed: Path, tmp_path: Path
) -> None:
    """What the chip is said to do counts for nothing against what its software takes."""
    liar = tmp_path / "liar.toml"
    liar.write_text(
        'schema = 1\nname = "liar"\nkind = "npu"\nextends = "tiny-npu"\n'
        '[behaviour.dtypes]\nfloat32 = "native"\n'
    )
    model = files.save_mlp(tmp_path / "mlp.onnx")
    command = ["-m", "hal.cli", "compile", str(model), "-o", str(tmp_path / "m.hal")]
    dims = ["--target", str(liar), "--dim", "batch=1"]
    done = run(installed, *command, *dims, "--no-fallback")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 2
    assert "cannot run on tiny_npu" in done.stderr
    assert "the chip computes on 8-bit integers only" in done.stderr
    done = run(installed, *command, *dims)
    assert done.returncode == 0, done.stderr
    assert "the chip computes on 8-bit integers only" in done.stdout
    tried = ["-m", "hal.cli", "conformance", str(liar), "--from-model", str(model), "--json"]
    report = json.loads(run(installed, *tried).stdout)
    assert report["unsupported"] == report["cases"] == 4
    assert all("8-bit integers only" in o["reason"] for o in report["outcomes"])


@pytest.mark.parametrize(("fault", "words"), [f for f in SURVIVED if f[0].startswith(("a", "p"))])
def test_conformance_tries_no_case_on_what_cannot_be_used(
    installed: Path, fault: str, words: str
) -> None:
    done = run(installed, "-m", "hal.cli", "conformance", "tiny-npu", fault=fault)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(words)
    assert len(done.stderr.strip().splitlines()) == 2


def test_conformance_of_a_good_package(installed: Path) -> None:
    code, outcomes, _ = conformance(installed, "")
    assert code == 0
    assert {o["status"] for o in outcomes} == {"passed", "unsupported"}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("lie", "no such operation"),
        ("raise", "failed when building: KeyError"),
        ("crash", "exit code -11"),
        ("exit", "exit code 3"),
        ("hang", "time limit"),
    ],
)
def test_conformance_survives_and_tells(installed: Path, fault: str, words: str) -> None:
    code, outcomes, stderr = conformance(installed, fault)
    assert code == 1
    assert "Traceback" not in stderr
    failed = [o for o in outcomes if o["status"] == "error"]
    assert failed
    assert any(words in o["reason"] for o in failed)
