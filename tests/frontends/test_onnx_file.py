"""Reading ONNX files: opsets, external data, bad input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx.reference import ReferenceEvaluator

from hal import ModelError
from hal.frontends import onnx_file
from hal.ir import OPSET, Graph

ADD = "(float[N,4] x) => (float[N,4] y) { y = Add (x, x) }"


def write(path: Path, body: str, opset: int = 13) -> onnx.ModelProto:
    text = f'<ir_version: 8, opset_import: ["": {opset}]> g {body}'
    model = onnx.parser.parse_model(text)
    onnx.save(model, path)
    return model


def write_external(folder: Path, *, location: str = "w.bin", nbytes: int = 64) -> Path:
    """A model ``y = x @ w`` whose ``w`` [4, 4] lies in a file of its own."""
    w = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[4, 4])
    w.data_location = onnx.TensorProto.EXTERNAL
    w.external_data.add(key="location", value=location)
    model = write(folder / "m.onnx", "(float[N,4] x) => (float[N,4] y) { y = MatMul (x, w) }", 20)
    model.graph.initializer.append(w)
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    (folder / "w.bin").write_bytes(np.eye(4, dtype=np.float32).tobytes()[:nbytes])
    return folder / "m.onnx"


def run(model: bytes, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(model, options, ["CPUExecutionProvider"]).run(None, feeds)


def graph_bytes(graph: Graph) -> bytes:
    return ir.serde.serialize_model(graph.model).SerializeToString()


OLD = {
    "squeeze of operator set 9": (9, "(float[2,1] x) => (float[2] y) { y = Squeeze<axes=[1]>(x) }"),
    "upsample of operator set 7": (
        7,
        "(float[1,1,2,2] x) => (float[1,1,4,4] y) { y = Upsample<scales=[1.,1.,2.,2.]>(x) }",
    ),
    "reduce": (
        13,
        "(float[2,3,4] x) => (float[2,4] y) { y = ReduceMean<axes=[1], keepdims=0>(x) }",
    ),
    "split": (13, "(float[6,2] x) => (float[3,2] y) { a, b = Split<axis=0>(x) y = Sub (a, b) }"),
    "roi": (
        13,
        """(float[1,1,6,6] x) => (float[1,1,2,2] y) <float[1,4] rois = {0.,0.,4.,4.}, int64[1] b = {0}>
        { y = RoiAlign<output_height=2, output_width=2>(x, rois, b) }""",
    ),
    "grid": (
        16,
        """(float[1,1,4,4] x) => (float[1,1,1,2] y) <float[1,1,2,2] grid = {0.1,0.2,0.3,0.4}>
        { y = GridSample<mode="bicubic">(x, grid) }""",
    ),
    "dft": (17, "(float[1,8,2] x) => (float[1,8,2] y) { y = DFT (x) }"),
    "softmax_of_opset_11": (11, "(float[2,3,4] x) => (float[2,3,4] y) { y = Softmax<axis=1>(x) }"),
    "unsqueeze_of_opset_9": (
        9,
        "(float[2,3] x) => (float[2,1,3] y) { y = Unsqueeze<axes=[1]>(x) }",
    ),
}


@pytest.mark.parametrize("name", OLD)
def test_an_old_file_means_the_same_at_the_current_opset(name: str, tmp_path: Path) -> None:
    opset, body = OLD[name]
    model = write(tmp_path / "m.onnx", body, opset)
    graph = onnx_file.from_file(tmp_path / "m.onnx")
    assert graph.model.opset_imports[""] == OPSET
    onnx.checker.check_model(ir.serde.serialize_model(graph.model), full_check=True)
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    want = run(model.SerializeToString(), {"x": x})
    if name == "roi":  # no kernel of the current opset in ONNX Runtime
        got = ReferenceEvaluator(ir.serde.serialize_model(graph.model)).run(None, {"x": x})
    else:
        got = run(graph_bytes(graph), {"x": x})
    np.testing.assert_allclose(got[0], want[0], atol=1e-6)


def test_group_normalization_gets_its_scale_per_channel(tmp_path: Path) -> None:
    body = """(float[2,4,3] x) => (float[2,4,3] y) <float[2] s = {1.,2.}, float[2] b = {0.,5.}>
        { y = GroupNormalization<num_groups=2>(x, s, b) }"""
    write(tmp_path / "m.onnx", body, 18)
    graph = onnx_file.from_file(tmp_path / "m.onnx")
    x = np.random.default_rng(0).standard_normal((2, 4, 3), np.float32)
    grouped = x.reshape(2, 2, 6)
    normal = (grouped - grouped.mean(-1, keepdims=True)) / grouped.std(-1, keepdims=True)
    want = normal.reshape(2, 4, 3) * np.array([1, 1, 2, 2]).reshape(1, 4, 1)
    want += np.array([0, 0, 5, 5]).reshape(1, 4, 1)
    np.testing.assert_allclose(run(graph_bytes(graph), {"x": x})[0], want, atol=1e-3)


def test_batch_normalization_in_training_mode_is_refused(tmp_path: Path) -> None:
    body = """(float[2,4] x, float[4] s, float[4] b, float[4] m, float[4] v)
        => (float[2,4] y, float[4] m2) { y, m2, v2, a, c = BatchNormalization (x, s, b, m, v) }"""
    write(tmp_path / "m.onnx", body)
    with pytest.raises(ModelError, match=r"m\.onnx: node .* is a BatchNormalization in training"):
        onnx_file.from_file(tmp_path / "m.onnx")


def test_dynamic_dims_without_a_name_get_one(tmp_path: Path) -> None:
    write(tmp_path / "m.onnx", "(float[?,4] x) => (float[?,4] y) { y = Add (x, x) }")
    graph = onnx_file.from_file(tmp_path / "m.onnx")
    assert graph.signature().inputs[0].dims == ("x_0", 4)


def test_initializers_are_no_inputs(tmp_path: Path) -> None:
    model = write(
        tmp_path / "m.onnx", "(float[4] x, float[4] w) => (float[4] y) { y = Add (x, w) }"
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(4, np.float32), "w"))
    onnx.save(model, tmp_path / "m.onnx")
    graph = onnx_file.from_file(tmp_path / "m.onnx")
    assert [s.name for s in graph.signature().inputs] == ["x"]


def test_external_weights_are_mapped_from_their_file(tmp_path: Path) -> None:
    graph = onnx_file.from_file(write_external(tmp_path))
    weight = graph.graph.initializers["w"].const_value
    assert isinstance(weight, ir.ExternalTensor)
    np.testing.assert_array_equal(weight.numpy(), np.eye(4))


@pytest.mark.parametrize("location", ["../w.bin", "/etc/hostname", "sub/../../w.bin"])
def test_external_data_may_not_leave_the_folder(location: str, tmp_path: Path) -> None:
    path = write_external(tmp_path, location=location)
    with pytest.raises(ModelError, match=r"tensor 'w' .* outside the model's folder"):
        onnx_file.from_file(path)


def test_a_link_may_not_lead_out_of_the_folder_either(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(64))
    (tmp_path / "model").mkdir()
    path = write_external(tmp_path / "model")
    (path.parent / "w.bin").unlink()
    (path.parent / "w.bin").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match="outside the model's folder"):
        onnx_file.from_file(path)


def test_missing_external_data_is_named(tmp_path: Path) -> None:
    path = write_external(tmp_path)
    (tmp_path / "w.bin").unlink()
    with pytest.raises(ModelError, match=r"tensor 'w' keeps its data in 'w\.bin', which does not"):
        onnx_file.from_file(path)


def test_short_external_data_is_named_with_sizes(tmp_path: Path) -> None:
    path = write_external(tmp_path, nbytes=60)
    with pytest.raises(ModelError, match=r"'w' needs bytes 0 to 64 of 'w\.bin', which has 60"):
        onnx_file.from_file(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no such file: .*none\.onnx"):
        onnx_file.from_file(tmp_path / "none.onnx")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"hello, world\n" * 9, "is a text file"),
        (b"\x00\x01\x02\xff" * 40, "is not an ONNX model, or is truncated"),
    ],
)
def test_a_file_that_is_no_model_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(ModelError, match=message):
        onnx_file.from_file(tmp_path / "m.onnx")


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    write(tmp_path / "m.onnx", ADD)
    data = (tmp_path / "m.onnx").read_bytes()
    for end in range(len(data)):
        (tmp_path / "m.onnx").write_bytes(data[:end])
        with pytest.raises(ModelError):
            onnx_file.from_file(tmp_path / "m.onnx")


def test_an_opset_that_is_too_new_is_refused(tmp_path: Path) -> None:
    model = write(tmp_path / "m.onnx", ADD)
    model.opset_import[0].version = 99
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="opset 99"):
        onnx_file.from_file(tmp_path / "m.onnx")
