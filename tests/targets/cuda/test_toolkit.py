"""Machine code for GPUs, made and read by NVIDIA's tools, and loaded by TVM's runtime for CUDA.

The driver is ours (``driver.cpp``): it hands kernels of the same source to the emulation. So what
is not shown here is what only a GPU can show: that it gives the same numbers, and how fast.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tvm")

import tvm

import hal
from hal.compiler import _lowered
from hal.conformance import model_cases
from hal.errors import TargetError
from hal.runtime.cache_options import parse_kv_cache
from hal.targets import load_backend, resolve
from hal.targets.cuda import CudaOptions
from hal.targets.cuda.backend import toolkit
from hal.targets.cuda.emulated import HEADERS
from hal.targets.cuda.pipeline import generate
from hal.targets.environments import Environment
from hal.targets.tvm.legalize import legalize
from hal.targets.tvm.lower import lower
from hal.targets.tvm.lowering import Shaping

pytestmark = pytest.mark.slow

PLAIN = Shaping(plain=True)
HERE = Path(__file__).parent
DISASSEMBLER = Environment(packages=("nvidia-cuda-nvdisasm==13.2.86",))
MODELS = [case for case in model_cases() if case.name in ("mlp", "cnn", "encoder")]


def set_up(name: str) -> Path:
    """The toolkit of a target, installed."""
    found = resolve(name)
    try:
        load_backend(found.backend).setup(found.descriptor, print)
        DISASSEMBLER.make(print)
    except TargetError as error:
        pytest.skip(f"{name} cannot be set up here: {error.message}")
    return toolkit(CudaOptions.of(found.descriptor))


def built(case: object, name: str, folder: Path) -> hal.Bundle:
    source = case.write(folder)  # type: ignore[attr-defined]
    return hal.compile(source, target=name, output=folder / "built", **case.options)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["h200-sxm:cuda", "jetson-agx-orin-64gb:cuda"])
@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_the_disassembler_finds_every_kernel_that_is_called(
    case: object, name: str, tmp_path: Path
) -> None:
    set_up(name)
    bundle = built(case, name, tmp_path)
    (record,) = bundle.manifest.builds.values()
    told = record.segments[0]["record"]
    (cubin,) = (tmp_path / "built").rglob("kernels.cubin")
    tools = DISASSEMBLER.folder / "venv" / "lib"
    (tool,) = tools.rglob("nvdisasm")
    done = subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True)
    arch = re.search(r"\.target\s+(\w+)|EF_CUDA_SM(\d+)", done.stdout)
    assert arch
    assert told["arch"].removeprefix("sm_").rstrip("a") in arch.group()
    assert set(re.findall(r"^\.text\.(\w+):", done.stdout, re.MULTILINE)) == set(told["functions"])
    assert "FFMA" in done.stdout
    assert "BAR.SYNC" in done.stdout
    if case.name == "mlp":  # type: ignore[attr-defined]
        (library,) = (tmp_path / "built").rglob("lib.so")
        machine = int.from_bytes(library.read_bytes()[18:20], "little")
        assert machine == (183 if "jetson" in name else 62)  # EM_AARCH64, EM_X86_64


def test_text_for_any_later_gpu_is_ptx(tmp_path: Path) -> None:
    set_up("nvidia-gpu:cuda")
    bundle = built(MODELS[0], "nvidia-gpu:cuda", tmp_path)
    (text,) = (tmp_path / "built").rglob("kernels.ptx")
    (record,) = bundle.manifest.builds.values()
    entries = re.findall(r"\.visible \.entry (\w+)\(", text.read_text().rstrip("\0"))
    assert set(entries) == set(record.segments[0]["record"]["functions"])
    assert ".target sm_80" in text.read_text()


def fake_driver(folder: Path) -> None:
    """Libraries in the places of the driver and of CUDA's runtime."""
    source = str(HERE / "driver.cpp")
    (folder / "map").write_text("libcudart.so.13 { global: *; };\n")
    compiler = [tvm.support.cc.get_cc(), "-shared", "-fPIC", "-O1"]
    for name, options in (
        ("libcuda.so.1", []),
        ("libcudart.so.13", ["-DRUNTIME_API", f"-Wl,--version-script={folder / 'map'}"]),
    ):
        output = ["-o", str(folder / name), f"-Wl,-soname,{name}", "-ldl"]
        subprocess.run([*compiler, *options, source, *output], check=True)


def launched_kernels(folder: Path, source: str, names: list[str]) -> Path:
    """The kernels that the driver launches, by name."""
    lines = [source, '#include "launched.h"', *(f"LAUNCHED({name})" for name in names)]
    (folder / "kernels.cu").write_text("\n".join(lines) + "\n")
    command = [
        tvm.support.cc.get_cc(), "-x", "c++", "-std=c++17", "-O2", "-fPIC", "-shared",
        "-fno-strict-aliasing", f"-I{HEADERS}", f"-I{HERE}", str(folder / "kernels.cu"),
        "-lstdc++", "-o", str(folder / "kernels.so"),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return folder / "kernels.so"


@pytest.mark.parametrize("name", ["mlp", "encoder", "language-model"])
def test_the_runtime_for_cuda_loads_and_launches_what_was_built(name: str, tmp_path: Path) -> None:
    """All but the GPU: TVM's runtime makes a module of the cubin, copies to and fro, launches."""
    tools = set_up("h200-sxm:cuda")
    case = next(c for c in model_cases() if c.name == name)
    bundle = built(case, "h200-sxm:cuda", tmp_path)
    (record,) = bundle.manifest.builds.values()
    assert record.verification is not None
    assert record.verification["passed"] is None
    assert record.verification["reason"].startswith("built, not run: there is no NVIDIA")
    graph = legalize(_lowered(bundle.graph(), parse_kv_cache("auto")), PLAIN)
    target = CudaOptions.of(resolve("h200-sxm:cuda").descriptor).target
    made = generate(lower(graph, PLAIN).module, target, emulated=False)
    assert {k.name for k in made.kernels} == set(record.segments[0]["record"]["functions"])
    fake_driver(tmp_path)
    kernels = launched_kernels(tmp_path, made.source, [k.name for k in made.kernels])
    variables = {"LD_LIBRARY_PATH": str(tmp_path), "EMULATED_KERNELS": str(kernels)}
    done = subprocess.run(
        [sys.executable, "-m", "hal.cli", "verify", str(tmp_path / "built"), "--json"],
        env={**os.environ, **variables}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)["builds"]["h200-sxm:cuda"]
    assert figures["passed"]
    launched = re.search(r"launched (\d+)", done.stderr)
    copied = re.search(r"copied in (\d+), out (\d+)", done.stderr)
    assert launched
    assert copied
    assert int(launched[1]) >= len(made.kernels) / 2
    assert int(copied[2]) >= 1
    assert tools.exists()


@pytest.mark.parametrize(
    ("quantize", "kv_cache"), [("w4a16-g32", "int4"), ("w8a8", "paged,int8"), (None, "paged")]
)
def test_codes_and_pages_are_right_in_the_emulation(
    quantize: str | None, kv_cache: str, tmp_path: Path
) -> None:
    case = next(c for c in model_cases() if c.name == "language-model")
    bundle = hal.compile(
        case.write(tmp_path), target="h200-sxm:emulated", quantize=quantize, kv_cache=kv_cache
    )
    (record,) = bundle.manifest.builds.values()
    assert record.verification is not None
    assert record.verification["passed"]
    assert record.placement["assigned"] == {"cuda": record.placement["nodes"]}
