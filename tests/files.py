"""Small models as files on disk, made with the plain ``onnx`` package and an old operator set."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HIDDEN = 24
CLASSES = 6


def mlp_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """``w1`` [24, 24], ``b1`` [24] and ``w2`` [24, 6]; the matrices are too large to be inlined."""
    rng = np.random.default_rng(seed)
    shapes = {"w1": (HIDDEN, HIDDEN), "b1": (HIDDEN,), "w2": (HIDDEN, CLASSES * 2)}
    return {n: (rng.standard_normal(s) / 4).astype(np.float32) for n, s in shapes.items()}


def mlp_expected(x: np.ndarray, seed: int = 0) -> np.ndarray:
    """What the model of :func:`mlp` gives, in numpy."""
    w = mlp_weights(seed)
    return np.maximum(x @ w["w1"] + w["b1"], 0) @ w["w2"]


def mlp(seed: int = 0, *, op: str = "Relu", domain: str = "") -> onnx.ModelProto:
    """``y = relu(x @ w1 + b1) @ w2`` with x [batch, 24] at operator set 17; ``op`` replaces Relu."""
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"], name="first"),
        helper.make_node(op, ["h"], ["r"], name="middle", domain=domain),
        helper.make_node("MatMul", ["r", "w2"], ["y"], name="last"),
    ]
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", HIDDEN])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", CLASSES * 2])],
        [numpy_helper.from_array(array, name) for name, array in mlp_weights(seed).items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    if domain:
        opsets.append(helper.make_opsetid(domain, 1))
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def save_mlp(path: Path, seed: int = 0) -> Path:
    """Write the model of :func:`mlp` as one file."""
    onnx.save_model(mlp(seed), path)
    return path


def save_external_mlp(folder: Path) -> tuple[Path, Path]:
    """Write the model of :func:`mlp` with its matrices in a file of their own; return both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    onnx.save_model(
        mlp(), path, save_as_external_data=True, location="model.data", size_threshold=0
    )
    return path, folder / "model.data"


def two_in_two_out(path: Path) -> Path:
    """``total = a + b`` and ``difference = a - b`` with a, b int64 [n, 2]."""
    ends = [helper.make_tensor_value_info(n, TensorProto.INT64, ["n", 2]) for n in "ab"]
    outs = ["total", "difference"]
    graph = helper.make_graph(
        [
            helper.make_node("Add", ["a", "b"], ["total"]),
            helper.make_node("Sub", ["a", "b"], ["difference"]),
        ],
        "pair",
        ends,
        [helper.make_tensor_value_info(n, TensorProto.INT64, ["n", 2]) for n in outs],
    )
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)]), path)
    return path


def repoint_external(path: Path, location: str) -> None:
    """Make every external tensor of a model file point at ``location``."""
    model = onnx.load_model(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(model.SerializeToString())


def flip(bundle: Path, member: str, *, at: float = 0.5) -> None:
    """Change one bit in the middle (or at the share ``at``) of a member of a folder or ``.hal`` file."""
    if bundle.is_dir():
        _flip_in(bundle / member, 0, (bundle / member).stat().st_size, at)
        return
    with zipfile.ZipFile(bundle) as archive:
        info = archive.getinfo(member)
    header = bundle.read_bytes()[info.header_offset : info.header_offset + 30]
    start = info.header_offset + 30 + int.from_bytes(header[26:28], "little")
    start += int.from_bytes(header[28:30], "little")
    _flip_in(bundle, start, info.file_size, at)


def _flip_in(path: Path, start: int, length: int, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[start + int(length * at)] ^= 0x10
    path.write_bytes(bytes(data))


def listing(folder: Path) -> Mapping[str, bytes | None]:
    """Every path under ``folder``, hidden ones included, with the content of files."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
        if "__pycache__" not in p.parts  # Python's own, made by an import
    }


def vendor_package(folder: Path, name: str, code: str, entry_points: str) -> Path:
    """A distribution as pip would install it: ``<name>.py`` and its metadata, for ``sys.path``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)
    return folder
