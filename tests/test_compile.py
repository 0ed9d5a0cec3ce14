"""The public API end to end: from a model to a bundle, from a bundle to results."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

import hal
from hal.runtime.cache import scratch_folder
from hal.targets.backend import Backend, Probe
from hal.targets.onnxruntime import OnnxRuntimeBackend
from tests import files, graphs, models

ROUTE = "host:onnxruntime"


def x_of(rows: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, files.HIDDEN)).astype(np.float32)


def names_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def is_right(bundle: hal.Bundle, target: str | None = None, rows: int = 3, seed: int = 0) -> bool:
    """Whether a bundle of the small ONNX model computes what numpy does."""
    x = x_of(rows)
    with bundle.session(target) as session:
        return bool(np.allclose(session(x), files.mlp_expected(x, seed), atol=1e-5))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return files.save_mlp(tmp_path_factory.mktemp("model") / "mlp.onnx")


@pytest.fixture(scope="module")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> hal.Bundle:
    return hal.compile(model, target=ROUTE, output=tmp_path_factory.mktemp("out") / "mlp")


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> hal.Bundle:
    """A model with carried state: a sum over everything that was ever passed in."""
    path = tmp_path_factory.mktemp("memory") / "memory.onnx"
    path.write_bytes(ir.to_proto(graphs.accumulator().stamp()).SerializeToString())
    return hal.compile(path, target=ROUTE)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, hal.Bundle]:
    folder = models.save("llama", tmp_path_factory.mktemp("lm"), num_hidden_layers=1)
    return models.build("llama", num_hidden_layers=1), hal.compile(folder, target=ROUTE)


# -- sources ----------------------------------------------------------------------------------


def test_an_onnx_file_of_an_old_operator_set_compiles_and_computes_the_same(
    bundle: hal.Bundle,
) -> None:
    assert bundle.targets == (ROUTE,)
    assert is_right(bundle)
    assert is_right(bundle, rows=1)


def test_an_onnx_file_with_external_data_is_self_contained_once_compiled(tmp_path: Path) -> None:
    path, _ = files.save_external_mlp(tmp_path / "source")
    compiled = hal.compile(path, target=ROUTE, output=tmp_path / "mlp.hal")
    shutil.rmtree(path.parent)
    assert is_right(compiled)


def test_a_module_compiles_with_named_dynamic_axes() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(24, 12), torch.nn.GELU()).eval()
    example = torch.randn(2, 24)
    compiled = hal.compile(module, example, target=ROUTE, dynamic={"input": {0: "rows"}})
    assert compiled.manifest.inputs[0].dims == ["rows", 24]
    session = compiled.session()
    for rows in (1, 5):
        x = torch.randn(rows, 24)
        assert np.allclose(session(x), module(x).detach().numpy(), atol=1e-5)


def test_a_hugging_face_directory_becomes_a_language_model_with_carried_state(
    language_model: tuple[torch.nn.Module, hal.Bundle],
) -> None:
    module, compiled = language_model
    assert compiled.manifest.task == "causal-lm"
    assert [s.name for s in compiled.session().inputs] == ["input_ids"]
    ids = [5, 6, 7]
    tokens = list(compiled.session().generate(ids, max_new_tokens=6, stop_token_ids=[]))
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(module(torch.tensor([ids])).logits[0, -1].argmax()))
    assert tokens == ids[3:]


def test_a_language_model_reports_top1_agreement(
    language_model: tuple[torch.nn.Module, hal.Bundle],
) -> None:
    figures = language_model[1].manifest.builds[ROUTE].verification
    assert figures is not None
    assert figures["calls"] == 3  # a prefill and two steps with state
    assert figures["outputs"]["logits"]["top1_agreement"] == 1.0


# -- outputs ----------------------------------------------------------------------------------


def test_a_name_that_ends_in_hal_makes_one_file(model: Path, tmp_path: Path) -> None:
    compiled = hal.compile(model, target=ROUTE, output=tmp_path / "mlp.hal")
    assert compiled.path.is_file()
    assert is_right(compiled)
    assert is_right(hal.load(tmp_path / "mlp.hal"))
    assert names_in(tmp_path) == ["mlp.hal"]


def test_any_other_name_makes_a_directory(bundle: hal.Bundle) -> None:
    assert bundle.path.is_dir()
    assert {"manifest.json", "manifest.sha256", "graph.onnx", "weights-00001.safetensors"} <= {
        p.name for p in bundle.path.iterdir()
    }
    assert is_right(hal.load(bundle.path))


def test_without_an_output_the_bundle_goes_with_the_object(model: Path) -> None:
    compiled = hal.compile(model, target=ROUTE, verify=False)
    path = compiled.path
    assert path.is_dir()
    del compiled
    gc.collect()
    assert not path.exists()


@pytest.mark.parametrize("name", ["mlp.hal", "mlp"])
def test_an_older_bundle_of_that_name_is_replaced(name: str, tmp_path: Path) -> None:
    first = files.save_mlp(tmp_path / "first.onnx", seed=0)
    second = files.save_mlp(tmp_path / "second.onnx", seed=1)
    output = tmp_path / "out" / name
    output.parent.mkdir()
    old = hal.compile(first, target=ROUTE, output=output)
    new = hal.compile(second, target=ROUTE, output=output)
    assert is_right(new, seed=1)
    assert names_in(output.parent) == [name]
    with pytest.raises(hal.BundleError, match="was replaced or removed since it was opened"):
        old.session()


def test_a_folder_that_is_no_bundle_is_not_replaced(model: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    before = files.listing(tmp_path)
    with pytest.raises(hal.BundleError, match="is a folder that is not a bundle"):
        hal.compile(model, target=ROUTE, output=tmp_path / "precious")
    assert files.listing(tmp_path) == before


def test_a_failed_compile_leaves_the_older_bundle_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "mlp.hal"
    hal.compile(model, target=ROUTE, output=output)
    before = files.listing(tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("power cut")

    monkeypatch.setattr("hal.compiler.build_target", fail)
    with pytest.raises(RuntimeError, match="power cut"):
        hal.compile(model, target=ROUTE, output=output)
    assert files.listing(tmp_path) == before
    assert is_right(hal.load(output))


def test_what_a_killed_compile_left_goes_with_the_next_one(model: Path, tmp_path: Path) -> None:
    left = tmp_path / ".mlp.hal.tmp-dead"
    (left / "bundle").mkdir(parents=True)
    foreign = tmp_path / ".other.hal.tmp-dead"
    foreign.mkdir()
    for folder in (left, foreign):
        os.utime(folder, (0, 0))
    with scratch_folder(tmp_path, ".mlp.hal.tmp-") as busy:  # another compile that is running
        assert not left.exists()
        os.utime(busy, (0, 0))
        hal.compile(model, target=ROUTE, output=tmp_path / "mlp.hal", verify=False)
        assert busy.exists()
    assert names_in(tmp_path) == [".other.hal.tmp-dead", "mlp.hal"]


# -- calls ------------------------------------------------------------------------------------


class OnlyDlpack:
    """An array of some other library that speaks nothing but DLPack."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(lambda x: x, id="numpy"),
        pytest.param(lambda x: x.tolist(), id="lists"),
        pytest.param(torch.from_numpy, id="torch"),
        pytest.param(lambda x: torch.from_numpy(x).requires_grad_(), id="torch with gradient"),
        pytest.param(OnlyDlpack, id="DLPack"),
        pytest.param(lambda x: np.asfortranarray(x), id="not contiguous"),
        pytest.param(lambda x: x[::-1][::-1], id="view"),
    ],
)
def test_a_session_takes_arrays_of_any_kind(
    bundle: hal.Bundle, given: Callable[[np.ndarray], Any]
) -> None:
    x = x_of(4)
    expected = files.mlp_expected(x)
    with bundle.session() as session:
        assert np.allclose(session(given(x)), expected, atol=1e-5)
        assert np.allclose(session(x=given(x)), expected, atol=1e-5)
        results = session.run({"x": given(x)})
    assert list(results) == ["y"]
    assert isinstance(results["y"], np.ndarray)


def test_several_outputs_come_in_the_order_of_the_signature(tmp_path: Path) -> None:
    session = hal.compile(files.two_in_two_out(tmp_path / "pair.onnx"), target=ROUTE).session()
    a, b = np.array([[5, 6]]), np.array([[1, 2]])
    for total, difference in (session(a, b), session(a, b=b), session(b=b, a=a)):
        assert total.tolist() == [[6, 8]]
        assert difference.tolist() == [[4, 4]]
    with pytest.raises(hal.InputError, match="input 'a' is given twice"):
        session(a, b, a=a)
    with pytest.raises(hal.InputError, match="3 inputs given, the model takes 2"):
        session(a, b, a)


def test_results_do_not_change_under_later_calls(bundle: hal.Bundle) -> None:
    first, second = x_of(2, seed=1), x_of(2, seed=2)
    with bundle.session() as session:
        kept = session(first)
        session(second)
        assert np.allclose(kept, files.mlp_expected(first), atol=1e-5)


def test_two_sessions_of_one_bundle_are_independent(memory: hal.Bundle) -> None:
    one, two = memory.session(), memory.session()
    x = np.ones((1, 2, 4), np.float32)
    one(x)
    assert two(x).tolist() == [[2, 2, 2, 2]]
    assert one(x).tolist() == [[4, 4, 4, 4]]


# -- state ------------------------------------------------------------------------------------


def test_state_is_carried_from_call_to_call_and_forgotten_on_reset(memory: hal.Bundle) -> None:
    session = memory.session()
    ones = np.ones((1, 3, 4), np.float32)
    assert session(ones).tolist() == [[3, 3, 3, 3]]
    assert session(ones[:, :1]).tolist() == [[4, 4, 4, 4]]
    assert session.position == 4
    assert session.export_arrays()["0.memory"].shape == (1, 4, 4)
    session.reset()
    assert session.position == 0
    assert session.export_arrays() == {}
    assert session(ones).tolist() == [[3, 3, 3, 3]]


def test_another_batch_size_needs_a_reset(memory: hal.Bundle) -> None:
    session = memory.session()
    session(np.ones((1, 2, 4), np.float32))
    with pytest.raises(hal.InputError, match="the batch is 2, the carried state has 1") as caught:
        session(np.ones((2, 2, 4), np.float32))
    assert "reset" in caught.value.hint
    session.reset()
    assert session(np.ones((2, 2, 4), np.float32)).shape == (2, 4)


def test_a_refused_call_does_not_touch_the_state(memory: hal.Bundle) -> None:
    session = memory.session()
    ones = np.ones((1, 2, 4), np.float32)
    session(ones)
    with pytest.raises(hal.InputError):
        session(np.ones((1, 2, 5), np.float32))
    assert session.position == 2
    assert session(ones).tolist() == [[4, 4, 4, 4]]


def test_decoding_step_by_step_equals_one_long_prefill(
    language_model: tuple[torch.nn.Module, hal.Bundle],
) -> None:
    module, compiled = language_model
    ids = np.random.default_rng(0).integers(3, 256, (2, 8))
    with torch.no_grad():
        expected = module(torch.from_numpy(ids)).logits.numpy()
    session = compiled.session()
    steps = [session(ids[:, :4])] + [session(ids[:, i : i + 1]) for i in range(4, 8)]
    assert np.abs(np.concatenate(steps, axis=1) - expected).max() < 1e-4


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


# -- verification -----------------------------------------------------------------------------


def test_error_figures_of_every_build_are_in_the_manifest(bundle: hal.Bundle) -> None:
    figures = bundle.manifest.builds[ROUTE].verification
    assert figures is not None
    assert figures["passed"] is True
    y = figures["outputs"]["y"]
    assert 0 <= y["mean_error"] <= y["max_error"] <= y["tolerance"] < 0.1
    assert bundle.verify() == {ROUTE: figures}


def test_unverified_builds_say_so(model: Path) -> None:
    compiled = hal.compile(model, target=ROUTE, verify=False)
    assert compiled.manifest.builds[ROUTE].verification is None
    assert compiled.verify()[ROUTE]["passed"]


def test_example_inputs_are_what_a_build_is_verified_on(tmp_path: Path) -> None:
    module = torch.nn.Linear(4, 2).eval()
    example = torch.full((3, 4), 7.0)
    compiled = hal.compile(module, (example,), target=ROUTE, output=tmp_path / "linear")
    assert compiled.manifest.samples is not None
    from safetensors.numpy import load_file

    (kept,) = load_file(compiled.path / compiled.manifest.samples).values()
    assert kept.tolist() == example.tolist()


def test_a_bundle_is_verified_against_another_model(
    bundle: hal.Bundle, model: Path, tmp_path: Path
) -> None:
    assert bundle.verify(against=model)[ROUTE]["passed"]
    with pytest.raises(hal.CheckFailed, match="output 'y': max error"):
        bundle.verify(against=files.save_mlp(tmp_path / "other.onnx", seed=1))


VENDOR = '''
import onnx_ir as ir
from hal.targets import Backend, Verdict
from hal.targets.onnxruntime import OnnxRuntimeBackend

class AcmeBackend(OnnxRuntimeBackend):
    """Runs on ONNX Runtime under a vendor's name; MODE says what is wrong with it."""
    name = "acme"
    mode = "MODE"

    def legalize(self, graph, descriptor):
        if self.mode == "wrong":
            graph = graph.clone()
            for node in graph.graph:
                if node.op_type == "Relu":
                    node.op_type = "LeakyRelu"
        return super().legalize(graph, descriptor)

    def supports(self, node, descriptor):
        if self.mode == "picky" and node.op_type == "Relu":
            return Verdict.no("no comparisons in hardware")
        return super().supports(node, descriptor)
'''


def use_vendor(monkeypatch: pytest.MonkeyPatch, folder: Path, mode: str) -> None:
    """Install a vendor's package: a chip ``acme-1`` reached through its own backend ``acme``."""
    files.vendor_package(
        folder / "site",
        "acme",
        VENDOR.replace("MODE", mode),
        "[hal.backends]\nacme = acme:AcmeBackend\n",
    )
    (folder / "acme-1.toml").write_text(
        'schema = 1\nname = "acme-1"\nkind = "npu"\n[routes.acme]\nbackend = "acme"\n'
    )
    monkeypatch.delitem(__import__("sys").modules, "acme", raising=False)
    monkeypatch.syspath_prepend(str(folder / "site"))
    monkeypatch.setenv("HAL_TARGET_PATH", str(folder / "acme-1.toml"))
    monkeypatch.setenv("HAL_CACHE", str(folder / "cache"))


def test_a_wrong_build_fails_and_names_the_first_tensor_that_diverges(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_vendor(monkeypatch, tmp_path, "wrong")
    output = tmp_path / "out" / "mlp.hal"
    output.parent.mkdir()
    with pytest.raises(hal.CheckFailed) as caught:
        hal.compile(model, target="acme-1", output=output)
    text = caught.value.message
    assert "verification failed on acme-1:acme: output 'y': max error" in text
    assert "first diverging tensor is 'r' (Relu, node 'middle')" in text
    assert caught.value.exit_code == 1
    assert names_in(output.parent) == []
    assert hal.compile(model, target="acme-1", output=output, verify=False).path == output


def test_refused_nodes_go_to_the_host_runtime_and_the_plan_says_why(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_vendor(monkeypatch, tmp_path, "picky")
    compiled = hal.compile(model, target="acme-1")
    placement = compiled.manifest.builds["acme-1:acme"].placement
    assert placement["assigned"].keys() == {"acme", "onnxruntime"}
    (refused,) = placement["refused"]
    assert (refused["op"], refused["reason"]) == ("Relu", "no comparisons in hardware")
    assert is_right(compiled)
    with pytest.raises(hal.UnsupportedError) as caught:
        hal.compile(model, target="acme-1", fallback=False)
    assert "Relu (node 'middle'): no comparisons in hardware" in caught.value.message
    assert "fallback" in caught.value.hint


def test_progress_is_told_in_sentences(model: Path) -> None:
    said: list[str] = []
    hal.compile(model, target=ROUTE, progress=said.append)
    assert said[0] == "reading the model"
    assert f"building for {ROUTE}" in said
    assert said[-1] == f"verifying {ROUTE}"
