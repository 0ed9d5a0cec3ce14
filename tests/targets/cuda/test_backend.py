"""Builds for GPUs without one: what is checked, what is told, what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("tvm")

import tvm

import hal
from hal.errors import DescriptorError, TargetError, UnsupportedError
from hal.ir.evaluate import evaluate
from hal.runtime.here import cannot_run
from hal.targets import load_backend, resolve
from hal.targets.cuda import CudaBackend, CudaOptions, device
from hal.targets.cuda.device import metadata, missing_device, runs
from hal.targets.cuda.inspection import Usage, require_fit
from hal.targets.cuda.pipeline import Kernel, generate
from hal.targets.tvm.legalize import legalize
from hal.targets.tvm.lower import lower
from hal.targets.tvm.lowering import Shaping
from tests.passes.toys import Toy

PLAIN = Shaping(plain=True)
BLOCK = {"max_threads_per_block": 1024, "max_shared_memory_per_block": 49152}
TARGET = {"kind": "cuda", "arch": "sm_90", "thread_warp_size": 32, **BLOCK}

needs_compiler = pytest.mark.skipif(not tvm.support.cc.get_cc(), reason="there is no C++ compiler")


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "DRIVER", "libcuda-that-is-not-there.so")


def perceptron(rows: int | str = 2) -> Toy:
    toy = Toy(x=[rows, 32])
    hidden = toy("Relu", toy("MatMul", toy.x, toy.weight(32, 64)))
    toy.output(toy("Softmax", toy("MatMul", hidden, toy.weight(64, 8)), axis=-1), "y")
    return toy


def saved(toy: Toy, folder: Path) -> Path:
    ir.save(toy.graph().model, folder / "model.onnx")
    return folder / "model.onnx"


# -- without a driver -------------------------------------------------------------------------


@pytest.mark.usefixtures("no_driver")
def test_the_probe_says_that_there_is_no_driver() -> None:
    probe = CudaBackend().probe()
    assert probe.status == "builds"
    assert probe.reason.startswith("there is no NVIDIA driver")


@pytest.mark.usefixtures("no_driver")
def test_a_build_for_the_device_cannot_run_and_an_emulated_one_can() -> None:
    backend = CudaBackend()
    assert "no NVIDIA driver" in backend.cannot_run(resolve("h200-sxm:cuda").descriptor)
    assert backend.cannot_run(resolve("h200-sxm:emulated").descriptor) == ""


def test_an_environment_that_is_not_made_is_told_with_what_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HAL_ENVIRONMENTS", str(tmp_path))
    with pytest.raises(TargetError, match="nvidia-cuda-nvrtc") as caught:
        hal.compile(saved(perceptron(), tmp_path), target="h200-sxm:cuda")
    assert caught.value.hint == "hal targets setup h200-sxm:cuda"


def slow_target(folder: Path, seconds: float) -> str:
    file = folder / "gpu.toml"
    file.write_text(
        f'schema = 1\nname = "gpu"\nextends = "h200-sxm"\n[routes.emulated]\nseconds = {seconds}\n'
    )
    return f"{file}:emulated"


def test_a_compilation_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"gpu did not finish 'compile' in 0\.05 s"):
        hal.compile(saved(perceptron(), tmp_path), target=slow_target(tmp_path, 0.05))


def test_a_worker_that_dies_is_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(TargetError, match="gpu died during 'compile': exit code 1"):
        hal.compile(saved(perceptron(), tmp_path), target=slow_target(tmp_path, 60.5))


# -- which device runs what -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "capability", "binary", "expected"),
    [
        ("sm_80", (8, 0), "cubin", True),
        ("sm_80", (8, 7), "cubin", True),
        ("sm_87", (8, 6), "cubin", False),
        ("sm_80", (9, 0), "cubin", False),
        ("sm_80", (9, 0), "ptx", True),
        ("sm_90", (8, 0), "ptx", False),
        ("sm_90a", (9, 0), "cubin", True),
        ("sm_90a", (10, 0), "ptx", False),
        ("sm_120", (12, 0), "cubin", True),
    ],
)
def test_code_runs_on_its_own_architecture(
    arch: str, capability: tuple[int, int], binary: str, expected: bool
) -> None:
    assert runs(arch, capability, binary) is expected


@pytest.mark.usefixtures("no_driver")
def test_nothing_is_missing_in_silence() -> None:
    assert missing_device("sm_90")


@pytest.mark.usefixtures("no_driver")
def test_a_build_that_is_not_run_is_told_so_by_every_command(
    tmp_path: Path,
) -> None:
    """The files of an emulated build stand for those of the device: only what is told matters."""
    bundle = hal.compile(
        saved(perceptron(), tmp_path), target="h200-sxm:emulated", output=tmp_path / "b"
    )
    descriptor = resolve("h200-sxm:cuda").descriptor
    (record,) = bundle.manifest.builds.values()
    record.descriptor = descriptor.to_dict()
    assert cannot_run(record).startswith("there is no NVIDIA driver")
    with pytest.raises(TargetError, match=r"no build in the bundle can run here \(.*NVIDIA driver"):
        bundle.session()
    with pytest.raises(TargetError, match="cannot run here: there is no NVIDIA driver"):
        bundle.session("h200-sxm:emulated")


# -- code -------------------------------------------------------------------------------------


def generated(toy: Toy, emulated: bool) -> Any:
    graph = legalize(toy.graph(), PLAIN)
    return generate(lower(graph, PLAIN).module, TARGET, emulated=emulated)


def test_emulated_kernels_are_those_of_the_device() -> None:
    one, other = generated(perceptron(), False), generated(perceptron(), True)
    # Where host and device have one memory, TVM ends kernels as it ends functions of the host.
    assert one.source == other.source.replace("\n  return;\n}\n", "\n}\n")
    assert one.kernels == other.kernels
    assert len(one.kernels) >= 3
    for kernel in one.kernels:
        assert f" {kernel.name}(" in one.source
        assert 0 < kernel.threads <= 1024
        assert set(kernel.launch) <= {f"{w}Idx.{a}" for w in ("block", "thread") for a in "xyz"}


def test_dynamic_dims_are_numbers_that_kernels_are_given() -> None:
    kernels = generated(perceptron("batch"), False).kernels
    assert any("int64" in kernel.arguments for kernel in kernels)
    told = metadata({k.name: {"arguments": k.arguments, "launch": k.launch} for k in kernels})
    read = tvm.get_global_func("runtime.LoadMetaDataFromJSON")
    assert len(read(json.dumps(told))) == len(kernels)


def kernel(threads: int = 256) -> Kernel:
    return Kernel("k", ("handle",), ("threadIdx.x",), threads)


@pytest.mark.parametrize(
    ("kernels", "usage", "said"),
    [
        ([kernel()], {}, "differ: k"),
        ([], {"k": Usage(1, 0, 0)}, "differ: k"),
        ([kernel(2048)], {"k": Usage(1, 0, 0)}, "2048 threads"),
        ([kernel()], {"k": Usage(1, 0, 60000)}, "60000 bytes of shared memory"),
    ],
)
def test_kernels_that_do_not_fit_the_chip_are_refused(
    kernels: list[Kernel], usage: dict[str, Usage], said: str
) -> None:
    with pytest.raises(UnsupportedError, match=said):
        require_fit(kernels, usage, TARGET)
    require_fit([kernel()], {"k": Usage(1, 0, 4096)}, TARGET)


# -- routes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "llvm"}, "not 'cuda'"),
        ({"arch": "hopper"}, "sm_80"),
        ({"max_threads_per_block": None}, "max_threads_per_block"),
    ],
)
def test_a_route_states_its_chip(change: dict[str, Any], said: str) -> None:
    route = resolve("h200-sxm:cuda").route
    table = {**route.options, "target": {**TARGET, **change}}  # type: ignore[union-attr]
    wrong = type(route).model_validate({"backend": "cuda", **table})
    with pytest.raises(DescriptorError, match=said):
        CudaOptions.of_route(wrong)
    assert said in CudaBackend().check_route(wrong)


@pytest.mark.parametrize(
    "name", ["nvidia-gpu", "a100-80g-sxm", "h100-sxm", "h200-sxm", "h20", "rtx-4090",
             "jetson-agx-orin-64gb", "jetson-orin-nano-super"],
)  # fmt: skip
def test_every_nvidia_chip_of_the_library_has_both_routes_for_one_architecture(name: str) -> None:
    both = [CudaOptions.of(resolve(f"{name}:{r}").descriptor) for r in ("cuda", "emulated")]
    assert both[0].target["arch"] == both[1].target["arch"]
    assert [o.emulated for o in both] == [False, True]
    assert both[0].binary == ("ptx" if name == "nvidia-gpu" else "cubin")
    assert load_backend("cuda").check_route(resolve(f"{name}:cuda").route) == ""


# -- emulated from end to end -----------------------------------------------------------------


@needs_compiler
def test_an_emulated_build_gives_what_the_reference_gives(tmp_path: Path) -> None:
    """Host code, kernels and the session are those of the device, but for whose memory it is."""
    bundle = hal.compile(saved(perceptron("batch"), tmp_path), target="h200-sxm:emulated")
    (record,) = bundle.manifest.builds.values()
    assert record.verification is not None
    assert record.verification["passed"]
    assert record.placement["assigned"] == {"cuda": record.placement["nodes"]}
    (note,) = record.segments[0]["record"]["notes"]
    assert "kernels for sm_90a in kernels.so, run by the processor: emulated" in note
    x = np.random.default_rng(0).standard_normal((5, 32)).astype(np.float32)
    expected = evaluate(bundle.graph(), {"x": x})["y"]
    np.testing.assert_allclose(bundle.session()(x), expected, atol=1e-6)
