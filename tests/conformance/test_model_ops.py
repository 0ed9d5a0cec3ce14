"""The ops of one model as cases: which there are, what they are given, how they are judged."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import hal
from hal.cli import main
from hal.conformance import ModelOps, model_cases, model_ops, run_case, run_suite
from hal.errors import InputError, ModelError
from tests import files
from tests.conformance.vendor import TARGET, use_vendor

ROUTE = "host:onnxruntime"


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, list[int | str]]],
    outputs: dict[str, tuple[int, list[int | str]]],
    weights: dict[str, np.ndarray] | None = None,
) -> Path:
    """Write a model of these nodes at operator set 20."""
    graph = helper.make_graph(
        nodes,
        "model",
        [helper.make_tensor_value_info(n, *kind) for n, kind in inputs.items()],
        [helper.make_tensor_value_info(n, *kind) for n, kind in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


@pytest.fixture
def mlp(tmp_path: Path) -> Path:
    return files.save_mlp(tmp_path / "mlp.onnx")


def names(found: ModelOps) -> list[str]:
    return [case.name for case in found.cases]


def inputs_of(case: Any) -> dict[str, np.ndarray]:
    return dict(case.options["inputs"])


def test_each_op_has_the_shapes_and_constants_of_the_model(mlp: Path) -> None:
    found = model_ops(mlp, dims={"batch": 7})
    assert names(found) == [
        "MatMul-float32_7x24-const_float32_24x24",
        "Add-float32_7x24-const_float32_24",
        "Relu-float32_7x24",
        "MatMul-float32_7x24-const_float32_24x12",
    ]
    weights = files.mlp_weights()
    written = onnx.load(found.cases[0].write(mlp.parent))
    (stored,) = written.graph.initializer
    assert np.array_equal(numpy_helper.to_array(stored), weights["w1"])
    x = inputs_of(found.cases[0])["x"]
    summed = inputs_of(found.cases[2])
    assert np.allclose(next(iter(summed.values())), x @ weights["w1"] + weights["b1"], atol=1e-5)


def test_equal_nodes_are_one_case_and_others_are_not(tmp_path: Path) -> None:
    make = helper.make_node
    path = save(
        tmp_path / "m.onnx",
        [
            make("Softmax", ["x"], ["a"], name="first", axis=-1),
            make("Softmax", ["a"], ["b"], name="again", axis=-1),
            make("Softmax", ["b"], ["c"], name="other", axis=0),
            make("Transpose", ["c"], ["d"], perm=[1, 0]),
            make("Softmax", ["d"], ["y"], axis=-1),
        ],
        {"x": (TensorProto.FLOAT, [4, 6])},
        {"y": (TensorProto.FLOAT, [6, 4])},
    )
    found = model_ops(path)
    assert Counter(case.op for case in found.cases) == {"Softmax": 3, "Transpose": 1}
    first = next(case for case in found.cases if case.name == "Softmax-float32_4x6")
    assert first.about == "axis=-1; 2 nodes, first 'first'"
    assert "Softmax-float32_4x6-2" in names(found)  # the other axis
    assert "Softmax-float32_6x4" in names(found)


def test_inputs_are_those_that_an_op_sees_in_the_model(tmp_path: Path) -> None:
    """Random indices would be out of range of one table or the other."""
    rng = np.random.default_rng(0)
    path = save(
        tmp_path / "m.onnx",
        [
            helper.make_node("ArgMax", ["x"], ["best"], axis=1, keepdims=0),
            helper.make_node("Gather", ["table", "best"], ["y"]),
        ],
        {"x": (TensorProto.FLOAT, [5, 9])},
        {"y": (TensorProto.FLOAT, [5, 4])},
        {"table": rng.standard_normal((9, 4)).astype(np.float32)},
    )
    gather = next(case for case in model_ops(path).cases if case.op == "Gather")
    (best,) = inputs_of(gather).values()
    assert best.dtype == np.int64
    assert best.max() > 1  # more than the flags that unnamed integers are otherwise
    assert run_case(gather, ROUTE, False).status == "passed"


def test_shape_arithmetic_becomes_constants_once_dims_are_bound(tmp_path: Path) -> None:
    make = helper.make_node
    path = save(
        tmp_path / "m.onnx",
        [
            make("Shape", ["x"], ["shape"], start=0, end=1),
            make("Concat", ["shape", "rest"], ["goal"], axis=0),
            make("Reshape", ["x", "goal"], ["y"]),
        ],
        {"x": (TensorProto.FLOAT, ["n", 6])},
        {"y": (TensorProto.FLOAT, ["n", 2, 3])},
        {"rest": np.array([2, 3], np.int64)},
    )
    bundle = tmp_path / "m.hal"
    hal.compile(path, target=ROUTE, output=bundle)
    for source in (path, bundle):
        found = model_ops(source, dims={"n": 4})
        assert names(found) == ["Reshape-float32_4x6-const_int64_3"]
        assert list(inputs_of(found.cases[0])) == ["x"]
        assert run_case(found.cases[0], ROUTE, False).status == "passed"


def test_dims_come_from_the_option_then_stored_inputs_then_defaults(
    mlp: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "mlp.hal"
    rows = np.ones((11, files.HIDDEN), np.float32)
    hal.compile(mlp, {"x": rows}, target=ROUTE, output=bundle)
    for source, dims, expected in [
        (mlp, {}, (2, "default")),
        (bundle, {}, (11, "stored")),
        (bundle, {"batch": 3}, (3, "given")),
    ]:
        found = model_ops(source, dims=dims)
        assert [(d.name, d.extent, d.origin) for d in found.dims] == [("batch", *expected)]
        assert f"Relu-float32_{expected[0]}x24" in names(found)
    assert np.array_equal(inputs_of(model_ops(bundle).cases[0])["x"], rows)


def test_quantization_around_an_op_is_part_of_its_case(tmp_path: Path) -> None:
    (case,) = (c for c in model_cases() if c.name == "cnn-int8")
    bundle = tmp_path / "cnn.hal"
    hal.compile(case.write(tmp_path), target=ROUTE, output=bundle, **case.options)
    found = model_ops(bundle)
    ops = {c.op for c in found.cases}
    assert "DequantizeLinear" not in ops
    conv = next(c for c in found.cases if c.op == "Conv")
    assert conv.name == "Conv-uint8_1x3x32x32-const_int8_16x3x3x3-const_int32_16"
    written = onnx.load(conv.write(tmp_path))
    assert [n.op_type for n in written.graph.node].count("DequantizeLinear") == 3
    relu = next(c for c in found.cases if c.op == "Relu")
    assert onnx.load(relu.write(tmp_path)).graph.output[0].type.tensor_type.elem_type == (
        TensorProto.UINT8
    )
    assert {run_case(c, ROUTE, False).status for c in found.cases} == {"passed"}


def test_codes_of_weights_stay_codes(tmp_path: Path) -> None:
    (case,) = (c for c in model_cases() if c.name == "mlp")
    bundle = tmp_path / "mlp.hal"
    hal.compile(case.write(tmp_path), target=ROUTE, output=bundle, quantize="w4a16-g32")
    stored = set()
    for product in (c for c in model_ops(bundle).cases if c.op == "MatMul"):
        written = onnx.load(product.write(tmp_path))
        types = {t.data_type for t in written.graph.initializer}
        unpacks = "DequantizeLinear" in {n.op_type for n in written.graph.node}
        assert unpacks == bool(types & {TensorProto.INT4, TensorProto.UINT4})
        stored |= types
        assert run_case(product, ROUTE, False).status == "passed"
    assert stored & {TensorProto.INT4, TensorProto.UINT4}


@pytest.mark.slow
def test_a_language_model_has_cases_of_the_prompt_and_of_the_next_token() -> None:
    (case,) = (c for c in model_cases() if c.name == "language-model")
    found = model_ops(case.write(Path()), dims={"batch": 1, "sequence": 6})
    attention = [c for c in found.cases if c.op == "Attention"]
    lengths = {inputs_of(c)[next(iter(inputs_of(c)))].shape[2] for c in attention}
    assert lengths == {6, 1}
    assert "hal::MixtureOfExperts" in {c.op for c in found.cases}
    tried = [c for c in found.cases if c.op in ("Attention", "hal::MixtureOfExperts")]
    assert {o.status for o in run_suite(tried, ROUTE, fallback=False)} == {"passed"}


def test_ops_without_a_case_are_listed_with_the_reason(tmp_path: Path) -> None:
    path = save(
        tmp_path / "m.onnx",
        [
            helper.make_node("RandomNormalLike", ["x"], ["noise"]),
            helper.make_node("Add", ["x", "noise"], ["y"]),
        ],
        {"x": (TensorProto.FLOAT, [3])},
        {"y": (TensorProto.FLOAT, [3])},
    )
    found = model_ops(path)
    assert names(found) == ["Add-float32_3-float32_3"]
    assert found.left_out == {"RandomNormalLike": "its results are random by definition"}


def test_a_dim_that_the_model_has_not_is_told(mlp: Path) -> None:
    with pytest.raises(InputError, match="the model has no dynamic dim 'btach'") as caught:
        model_ops(mlp, dims={"btach": 1})
    assert caught.value.hint == "did you mean 'batch'?"
    with pytest.raises(ModelError, match="no such file"):
        model_ops("nosuch.onnx")


@pytest.mark.parametrize(
    ("mode", "op", "status", "words"),
    [
        ("", "Relu", "passed", ""),
        ("picky", "Relu", "unsupported", "no comparisons in hardware"),
        ("picky", "Add", "passed", ""),
        ("wrong", "Relu", "wrong", "max error 1 >"),
        ("half", "Relu", "wrong dtype", "float16[2, 24], expected float32[2, 24]"),
        ("exit", "Relu", "error", "the process died with exit code 3"),
        ("hang", "Relu", "error", "ran past the time limit"),
    ],
)
def test_a_case_is_judged_by_what_the_target_makes_of_it(
    mlp: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    op: str,
    status: str,
    words: str,
) -> None:
    use_vendor(monkeypatch, tmp_path, mode)
    cases = [c for c in model_ops(mlp).cases if c.op == op]
    limit = 5.0 if mode == "hang" else 60.0
    (outcome,) = run_suite(cases, TARGET, fallback=False, limit=limit)
    assert outcome.status == status
    assert words in outcome.reason
    assert outcome.op == op
    if status == "passed":
        assert (outcome.share, outcome.max_error) == (1.0, pytest.approx(0, abs=1e-5))
    if status == "wrong":
        assert outcome.max_error == pytest.approx(1)


def test_what_the_host_runs_is_no_success_even_where_it_may(
    mlp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_vendor(monkeypatch, tmp_path, "picky")
    (case,) = (c for c in model_ops(mlp).cases if c.op == "Relu")
    outcome = run_case(case, TARGET, True)
    assert (outcome.status, outcome.share) == ("unsupported", 0.0)
    assert "no comparisons in hardware" in outcome.reason


# -- the command ------------------------------------------------------------------------------


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["conformance", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_the_command_reports_as_text_json_and_html(
    mlp: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use_vendor(monkeypatch, tmp_path, "picky")
    options = [TARGET, "--from-model", mlp, "--op", "Relu,Add", "--dim", "batch=4"]
    code, out, _ = command(capsys, *options, "--html", tmp_path / "page.html")
    assert code == 0
    assert "dims: batch = 4 (given)" in out
    assert "the ops of mlp.onnx on acme-1:acme" in out
    assert (
        "2 cases: 1 passed, 0 wrong, 0 wrong dtype, 1 unsupported, 0 built, not run, 0 error" in out
    )
    page = (tmp_path / "page.html").read_text()
    assert "dims: batch = 4 (given)" in page
    assert "<td>100 %" in page
    assert "no comparisons in hardware" in page
    code, out, _ = command(capsys, *options, "--json")
    report = json.loads(out)
    assert report["dims"] == [{"name": "batch", "extent": 4, "origin": "given"}]
    by_op = {o["op"]: o for o in report["outcomes"]}
    assert by_op["Add"]["share"] == 1.0
    assert by_op["Add"]["max_error"] < 1e-5
    assert by_op["Relu"]["status"] == "unsupported"
    assert report["per_op"] == {"Add": {"passed": 1}, "Relu": {"unsupported": 1}}


def test_the_command_fails_for_a_wrong_dtype(
    mlp: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use_vendor(monkeypatch, tmp_path, "half")
    code, out, err = command(capsys, TARGET, "--from-model", mlp, "--op", "Relu")
    assert code == 1
    assert "1 wrong dtype" in out
    assert "error: acme-1:acme: 1 of 1 cases failed, first Relu-float32_2x24: wrong dtype" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--from-model", "MLP", "--op", "Reluu"], "no case is about the op 'Reluu'"),
        (["--from-model", "MLP", "--models"], "small models and the ops of a model are both"),
        (["--dim", "batch=2"], "--dim binds the dims of a model, and there is none"),
        (["--from-model", "MLP", "--dim", "rows=2"], "the model has no dynamic dim 'rows'"),
        (["--from-model", "nosuch.hal"], "nosuch.hal"),
        (["--from-model", "nosuch"], "no such file or directory: nosuch"),
    ],
)
def test_options_that_cannot_be_are_told(
    mlp: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    given = [str(mlp) if o == "MLP" else o for o in options]
    code, _, err = command(capsys, ROUTE, *given)
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert len(err.strip().splitlines()) == 2
