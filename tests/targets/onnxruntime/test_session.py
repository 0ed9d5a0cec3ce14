from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch

from hal import InputError, TargetError, UnsupportedError
from hal.ir.weights import write_weights
from hal.targets.onnxruntime import OnnxRuntimeBackend
from tests.targets.onnxruntime.support import build, descriptor, executable, load, packed, parse

ADD = "g (float[n, 2] x, float[n, 2] y) => (float[n, 2] z) { z = Add (x, y) }"
LINEAR = "g (float[n, 64] x) => (float[n, 32] y) { y = MatMul (x, w) }"


def weight() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((64, 32), dtype=np.float32)


def test_inputs_may_be_numpy_or_dlpack(tmp_path: Path) -> None:
    run = executable(parse(ADD), tmp_path).run
    x = torch.ones(3, 2, requires_grad=True)
    y = np.full((3, 2), 2, np.float32)
    assert np.array_equal(run({"x": x, "y": y})["z"], np.full((3, 2), 3))


def test_bfloat16_and_int4_go_in_and_out(tmp_path: Path) -> None:
    run = executable(
        parse(
            "g (bfloat16[n] x, int4[n] i) => (bfloat16[n] y, int4[n] j)"
            " { y = Exp (x) j = Identity (i) }"
        ),
        tmp_path,
    ).run
    x = np.array([0, 1, 2], ml_dtypes.bfloat16)
    i = np.array([-3, 0, 7], ml_dtypes.int4)
    out = run({"x": x, "i": i})
    assert out["y"].dtype == x.dtype
    assert np.array_equal(out["y"], np.exp(x.astype(np.float32)).astype(x.dtype))
    assert np.array_equal(out["j"], i)


def test_sequences_are_lists(tmp_path: Path) -> None:
    run = executable(
        parse("g (seq(float[n]) s, int64 i) => (float[n] y) { y = SequenceAt (s, i) }"), tmp_path
    ).run
    items = [np.zeros(2, np.float32), np.ones(3, np.float32)]
    assert np.array_equal(run({"s": items, "i": np.array(1)})["y"], items[1])


def test_a_loop_is_entered_with_a_condition_of_one_element(tmp_path: Path) -> None:
    graph = parse(
        """g (int64 n, bool[1] go, float[2] x) => (float[2] y) {
            y = Loop (n, go, x) <body = b (int64 i, bool c, float[2] old)
                => (bool again, float[2] new) { again = Identity (c) new = Add (old, x) }>
        }"""
    )
    x = np.array([1.0, 2.0], np.float32)
    given = {"n": np.array(3), "go": np.array([True]), "x": x}
    assert np.array_equal(executable(graph, tmp_path).run(given)["y"], 4 * x)


def test_strings_go_in_and_out(tmp_path: Path) -> None:
    run = executable(
        parse("g (string[n] a, string[n] b) => (string[n] y) { y = StringConcat (a, b) }"), tmp_path
    ).run
    out = run({"a": np.array(["x"], object), "b": np.array(["y"], object)})
    assert out["y"].tolist() == ["xy"]


def test_the_model_file_holds_no_weights(tmp_path: Path) -> None:
    graph = parse(LINEAR, w=weight())
    write_weights(graph, tmp_path)
    record = build(graph, tmp_path)
    assert record["repacked_bytes"] == 0
    proto = onnx.load(tmp_path / "builds" / "model.onnx", load_external_data=False)
    (tensor,) = proto.graph.initializer
    assert {e.key: e.value for e in tensor.external_data}["location"] == "weights-00001.safetensors"
    assert (tmp_path / "builds" / "model.onnx").stat().st_size < weight().nbytes
    x = np.ones((1, 64), np.float32)
    y = load(record, tmp_path).run({"x": x})["y"]
    assert np.allclose(y, x @ weight(), atol=1e-5)


def test_weights_made_by_the_backend_are_written_beside_the_model(tmp_path: Path) -> None:
    record = build(parse(LINEAR, w=weight()), tmp_path)
    assert record["repacked_bytes"] == weight().nbytes
    assert (tmp_path / "builds" / "weights-00001.safetensors").exists()


def test_a_packed_bundle_runs_from_inside_the_file(tmp_path: Path) -> None:
    root = tmp_path / "bundle"
    root.mkdir()
    graph = parse(LINEAR, w=weight())
    write_weights(graph, root)
    record = build(graph, root)
    file = packed(root, tmp_path / "one.hal")
    x = np.ones((2, 64), np.float32)
    assert np.allclose(load(record, file).run({"x": x})["y"], x @ weight(), atol=1e-5)


def test_a_wrong_shape_is_an_input_error_of_one_sentence(tmp_path: Path) -> None:
    run = executable(parse(ADD), tmp_path).run
    with pytest.raises(InputError, match="onnxruntime refuses the input") as caught:
        run({"x": np.ones((2, 3), np.float32), "y": np.ones((2, 2), np.float32)})
    assert "\n" not in caught.value.message


def test_a_missing_provider_is_an_error_not_a_silent_fallback(tmp_path: Path) -> None:
    record = build(parse(ADD), tmp_path)
    chip = descriptor(providers=("NoSuchExecutionProvider",), package="some-package")
    with pytest.raises(TargetError, match="has no NoSuchExecutionProvider") as caught:
        load(record, tmp_path, chip)
    assert caught.value.hint == "pip install some-package"


def test_a_closed_session_says_so(tmp_path: Path) -> None:
    session = executable(parse(ADD), tmp_path)
    session.close()
    with pytest.raises(TargetError, match="closed"):
        session.run({"x": np.ones((1, 2), np.float32), "y": np.ones((1, 2), np.float32)})


def test_building_what_nothing_covers_names_op_node_and_dtype(tmp_path: Path) -> None:
    graph = parse("g (double[n] x) => (double[n] y) { y = Asin (x) }")
    with pytest.raises(UnsupportedError, match=r"Asin .*double"):
        build(graph, tmp_path)


def test_a_node_is_claimed_by_kernel_or_body_and_refused_with_a_reason() -> None:
    backend, chip = OnnxRuntimeBackend(), descriptor()

    def verdict(text: str) -> tuple[bool, str]:
        found = backend.supports(parse(text).graph[0], chip)
        return found.claimed, found.reason

    assert verdict("g (float[n] x) => (float[n] y) { y = Relu (x) }") == (True, "")
    assert verdict("g (float[n] x) => (float[n] y) { y = Mish (x) }") == (True, "")
    assert verdict("g (bfloat16[n] x) => (bfloat16[n] y) { y = Mish (x) }") == (True, "")
    claimed, reason = verdict("g (double[n] x) => (double[n] y) { y = Asin (x) }")
    assert not claimed
    assert "Asin(22) does not take double" in reason


def test_a_refused_node_may_have_a_subgraph_that_reads_from_outside() -> None:
    (node,) = (
        n
        for n in parse(
            """g (float[1, 1, 2, 2] q, float bias) => (float[1, 1, 2, 2] y) {
                y = ai.onnx.preview.FlexAttention (q, q, q) <score_mod = m
                    (float[1, 1, 2, 2] s) => (float[1, 1, 2, 2] t) { t = Add (s, bias) }>
            }"""
        ).graph
    )
    verdict = OnnxRuntimeBackend().supports(node, descriptor())
    assert not verdict.claimed
    assert "FlexAttention" in verdict.reason


def test_the_backend_is_always_present() -> None:
    probe = OnnxRuntimeBackend().probe()
    assert probe.status == "present"
    assert "CPUExecutionProvider" in probe.reason
