"""A model on several chips: cut where memories are full, the same results, and a drawing of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import hal
from hal.bundle.drawing import page
from hal.errors import UnsupportedError
from hal.targets.partition import stages
from tests.passes.toys import Toy

KIB = 1024
CHIP = """
schema = 1
name = "{name}"
extends = "cpu"
[[memory]]
level = "dram"
capacity = {{ value = {size}, unit = "KiB", source = "invented", confidence = "vendor" }}
"""


def chip(folder: Path, name: str, size: int) -> str:
    file = folder / f"{name}.toml"
    file.write_text(CHIP.format(name=name, size=size))
    return str(file)


def chain(layers: int = 6) -> Toy:
    """Products of 16 KiB of weights each, the third of which has a narrow result."""
    toy = Toy(x=["batch", 64])
    stream, width = toy.x, 64
    for i in range(layers):
        out = 8 if i == 2 else 64
        stream = toy("Tanh", toy("MatMul", stream, toy.weight(width, out)))
        width = out
    toy.output(stream, "y")
    return toy


def saved(folder: Path) -> Path:
    ir.save(chain().graph().model, folder / "chain.onnx")
    return folder / "chain.onnx"


def test_each_chip_gets_what_fits() -> None:
    parts = stages(chain().graph(), ["a", "b"], [40 * KIB, None])
    assert [p.backend for p in parts] == ["a", "b"]
    held = sum(
        v.const_value.nbytes for n in parts[0].nodes for v in n.inputs if v and v.const_value
    )
    assert 0.7 * 40 * KIB < held <= 40 * KIB


def test_the_cut_is_where_little_moves() -> None:
    parts = stages(chain().graph(), ["a", "b"], [36 * KIB, None])
    (crossing,) = parts[1].inputs
    assert [str(d) for d in crossing.shape or ()] == ["batch", "8"]


def test_one_chip_is_enough_for_a_small_model() -> None:
    assert [p.backend for p in stages(chain().graph(), ["a", "b"], [None, 1.0])] == ["a"]


def test_what_fits_nowhere_is_told_by_how_much() -> None:
    with pytest.raises(UnsupportedError, match=r"0\.0\d MiB are left when a and b are full"):
        stages(chain().graph(), ["a", "b"], [20 * KIB, 20 * KIB])


def test_a_pipeline_gives_the_references_result(tmp_path: Path) -> None:
    target = f"{chip(tmp_path, 'small', 40)}:onnxruntime+host"
    bundle = hal.compile(saved(tmp_path), target=target, output=tmp_path / "m.hal")
    (record,) = bundle.manifest.builds.values()
    assert record.target == "small:onnxruntime+host:onnxruntime"
    assert record.verification is not None
    assert record.verification["passed"]
    assert set(record.placement["assigned"]) == {"small:onnxruntime", "host:onnxruntime"}
    again = hal.load(tmp_path / "m.hal")
    x = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    with again.session("small+host") as session, hal.compile(saved(tmp_path)).session() as other:
        np.testing.assert_allclose(session.run({"x": x})["y"], other.run({"x": x})["y"], atol=1e-6)


def test_a_drawing_has_every_node_in_its_colour(tmp_path: Path) -> None:
    target = f"{chip(tmp_path, 'small', 40)}:onnxruntime+host"
    bundle = hal.compile(saved(tmp_path), target=target)
    (record,) = bundle.manifest.builds.values()
    text = page(bundle.graph(), record)
    assert text.count("<rect") == record.placement["nodes"] == 12
    for place, count in record.placement["assigned"].items():
        assert f"{place}: {count}</span>" in text


def test_a_language_model_on_two_chips_says_the_same(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from importlib.resources import files

    demo = str(files("hal.demo_model"))
    size = sum(p.stat().st_size for p in Path(demo).glob("*.safetensors")) // (2 * KIB)
    target = f"{chip(tmp_path, 'small', size)}:onnxruntime+host"
    bundle = hal.compile(demo, target=[target, "host:onnxruntime"])
    prompt = [5, 6, 7, 8]
    tokens = [
        list(bundle.session(name).generate(prompt, max_new_tokens=12))
        for name in bundle.manifest.builds
    ]
    assert len(tokens) == 2
    assert tokens[0] == tokens[1]


def test_one_chip_says_what_does_not_fit_it(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError) as caught:
        hal.compile(
            saved(tmp_path), target=f"{chip(tmp_path, 'small', 40)}:onnxruntime",
            output=tmp_path / "m.hal",
        )  # fmt: skip
    assert "weights take 0.07 MiB, the memory holds 0.04, 0.03 MiB too little" in str(caught.value)
    assert "--target small:onnxruntime+host" in caught.value.hint
    assert not (tmp_path / "m.hal").exists()


def test_shapes_that_are_computed_may_cross_a_cut(tmp_path: Path) -> None:
    toy = Toy(x=["batch", 64])
    count = toy("Gather", toy("Shape", toy.x), np.array(0))
    steps = toy("Range", np.array(0), count, np.array(1))
    stream = toy.x
    for _ in range(4):
        stream = toy("Tanh", toy("MatMul", stream, toy.weight(64, 64)))
    places = toy("Cast", toy("Unsqueeze", steps, np.array([1])), to=ir.DataType.FLOAT)
    toy.output(toy("Add", stream, places), "y")
    graph = toy.graph()
    for node in graph.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.type, value.shape = None, None
    ir.save(graph.model, tmp_path / "m.onnx")
    target = f"{chip(tmp_path, 'small', 40)}:onnxruntime+host"
    bundle = hal.compile(tmp_path / "m.onnx", target=target, output=tmp_path / "m.hal")
    (record,) = bundle.manifest.builds.values()
    assert record.verification is not None
    assert record.verification["passed"]
