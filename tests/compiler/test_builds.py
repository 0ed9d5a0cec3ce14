"""Builds for one target or several, the best one for a machine, and the cache of builds."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hal
from hal.targets.backend import Backend, Probe
from hal.targets.onnxruntime import OnnxRuntimeBackend
from tests import files
from tests.compiler.support import ROUTE, is_right, names_in, use_vendor, x_of

# -- builds and targets -----------------------------------------------------------------------


def test_one_bundle_holds_builds_for_several_targets(model: Path) -> None:
    compiled = hal.compile(model, target=[ROUTE, "x86-64:onnxruntime"])
    assert compiled.targets == (ROUTE, "x86-64:onnxruntime")
    for name in (*compiled.targets, "host", "x86-64"):
        assert is_right(compiled, name)


def test_one_bundle_runs_on_two_runtimes_with_the_same_result(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    routes = [ROUTE, "host:tvm"]
    compiled = hal.compile(model, target=routes, fallback=False, output=tmp_path / "mlp.hal")
    for route in routes:
        assert is_right(compiled, route, rows=1)
        assert is_right(compiled, route, rows=5)
        assert compiled.manifest.builds[route].verification["passed"]
    again = hal.load(tmp_path / "mlp.hal").retarget("x86-64:tvm", output=tmp_path / "other")
    assert is_right(again)
    assert compiled.session().target == ROUTE  # the first named is the first choice


def test_state_is_carried_on_both_runtimes(memory: hal.Bundle) -> None:
    pytest.importorskip("tvm")
    sessions = [memory.session(), memory.retarget("host:tvm").session()]
    rng = np.random.default_rng(0)
    for length in (3, 1, 1, 2):
        x = rng.standard_normal((2, length, 4)).astype(np.float32)
        first, second = (session(x) for session in sessions)
        assert np.allclose(first, second, atol=1e-5)
    assert [s.position for s in sessions] == [7, 7]
    first, second = (s.export_arrays()["0.memory"] for s in sessions)
    assert np.array_equal(first, second)
    for session in sessions:
        session.reset()
        assert session(np.ones((1, 1, 4), np.float32)).tolist() == [[1, 1, 1, 1]]


def test_a_call_is_checked_alike_on_both_runtimes(model: Path) -> None:
    pytest.importorskip("tvm")
    session = hal.compile(model, target="host:tvm").session()
    with pytest.raises(hal.InputError, match="input 'x' has extent 23 on axis 1, expected 24"):
        session(np.zeros((2, 23), np.float32))
    with pytest.raises(hal.InputError, match="input 'x' has dtype float64"):
        session(np.zeros((2, 24)))
    x = x_of(2)
    assert np.allclose(session(torch.from_numpy(x)), files.mlp_expected(x), atol=1e-5)
    assert np.allclose(session(np.asfortranarray(x)), files.mlp_expected(x), atol=1e-5)
    kept = session(x)
    session(x_of(2, seed=9))
    assert np.allclose(kept, files.mlp_expected(x), atol=1e-5)
    assert session(np.zeros((0, 24), np.float32)).shape == (0, 12)


def test_a_session_says_which_build_it_runs(bundle: hal.Bundle) -> None:
    assert bundle.session("host").target == ROUTE
    with pytest.raises(hal.TargetError, match="no build for 'x86-64'") as caught:
        bundle.session("x86-64")
    assert "hal retarget" in caught.value.hint


def test_the_best_build_is_the_first_that_can_run_here(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_vendor(monkeypatch, tmp_path, "absentee")
    compiled = hal.compile(model, target=["acme-1", ROUTE], verify=False)
    assert compiled.session().target == "acme-1:acme"
    monkeypatch.setattr("acme.AcmeBackend.probe", lambda _: Probe("absent", "no such card"))
    assert compiled.session().target == ROUTE
    alone = hal.compile(model, target=ROUTE, verify=False)
    monkeypatch.setattr(OnnxRuntimeBackend, "probe", lambda _: Probe("absent", "not today"))
    with pytest.raises(hal.TargetError, match=r"no build in the bundle can run here.*not today"):
        alone.session()


@pytest.mark.parametrize("name", ["other.hal", "other"])
def test_a_bundle_is_retargeted_without_its_model(name: str, tmp_path: Path) -> None:
    path = files.save_mlp(tmp_path / "mlp.onnx")
    first = hal.compile(path, target=ROUTE, output=tmp_path / "first.hal")
    path.unlink()
    other = first.retarget("x86-64:onnxruntime", output=tmp_path / name)
    first.path.unlink()
    assert other.targets == ("x86-64:onnxruntime",)
    assert other.manifest.builds["x86-64:onnxruntime"].verification["passed"]
    assert other.manifest.passes
    assert is_right(hal.load(tmp_path / name))


def test_a_bundle_may_be_retargeted_onto_itself(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "mlp.hal"
    first = hal.compile(model, target=ROUTE, output=output)
    first.retarget([ROUTE, "x86-64:onnxruntime"], output=output)
    assert hal.load(output).targets == (ROUTE, "x86-64:onnxruntime")
    assert names_in(tmp_path) == ["mlp.hal"]


# -- cache ------------------------------------------------------------------------------------


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names of graphs that a backend really built, on an empty cache in ``tmp_path / "cache"``."""
    monkeypatch.setenv("HAL_CACHE", str(tmp_path / "cache"))
    done: list[str] = []
    build = OnnxRuntimeBackend.build

    def counted(self: Backend, graph: hal.ir.Graph, context: Any) -> dict[str, Any]:
        done.append(graph.name)
        return build(self, graph, context)

    monkeypatch.setattr(OnnxRuntimeBackend, "build", counted)
    return done


def test_a_second_compile_takes_the_build_from_the_cache(
    model: Path, builds: list[str], tmp_path: Path
) -> None:
    one = hal.compile(model, target=ROUTE, verify=False, output=tmp_path / "one")
    two = hal.compile(model, target=ROUTE, verify=False, output=tmp_path / "two")
    assert builds == ["mlp"]
    timed = {"manifest.json", "manifest.sha256"}  # they hold the seconds that passes took
    first, second = files.listing(one.path), files.listing(two.path)
    assert first.keys() == second.keys()
    assert all(first[name] == second[name] for name in first.keys() - timed)
    assert is_right(two)
    assert (tmp_path / "cache" / "builds").is_dir()


def test_other_weights_another_target_or_other_options_are_built_anew(
    model: Path, builds: list[str], tmp_path: Path
) -> None:
    hal.compile(model, target=ROUTE, verify=False)
    hal.compile(files.save_mlp(tmp_path / "other.onnx", seed=1), target=ROUTE, verify=False)
    hal.compile(model, target="x86-64:onnxruntime", verify=False)
    hal.compile(model, target=ROUTE, fallback=False, verify=False)
    assert len(builds) == 4


def test_a_half_written_cache_entry_is_not_used(
    model: Path, builds: list[str], tmp_path: Path
) -> None:
    hal.compile(model, target=ROUTE, verify=False)
    (entry,) = (tmp_path / "cache" / "builds").iterdir()
    (entry / "record.json").unlink()
    shutil.rmtree(entry / "files")
    assert is_right(hal.compile(model, target=ROUTE, verify=False))
    assert len(builds) == 2


def test_a_cache_that_cannot_be_written_is_done_without(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("this is a file")
    monkeypatch.setenv("HAL_CACHE", str(tmp_path / "cache"))
    assert is_right(hal.compile(model, target=ROUTE))
