"""Dims get extents by name, everywhere they occur."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import hal
from hal.errors import InputError
from hal.ir import Graph
from hal.passes.fix_dims import FixDims, fix_dims
from tests.passes.toys import Toy

EYE = np.eye(4, dtype=np.float32)


def graph() -> Graph:
    """Two inputs that share a dim, and a dim that is computed from two others."""
    toy = Toy(x=["batch", "n", 4], y=["batch", "m", 4])
    joined = toy("Concat", toy.x, toy.y, axis=1)
    toy.output(toy("MatMul", joined, EYE), "out")
    return toy.graph()


def test_extents_reach_every_value() -> None:
    before = graph()
    after = fix_dims(before, {"batch": 2, "n": 3})
    shapes = {v.name: [str(d) for d in v.shape or ()] for v in after.graph.inputs}
    assert shapes == {"x": ["2", "3", "4"], "y": ["2", "m", "4"]}
    assert str(before.graph.inputs[0].shape[0]) == "batch"
    whole = fix_dims(before, {"batch": 2, "n": 3, "m": 5})
    for node in whole.graph:
        for value in node.outputs:
            assert value.shape is None or value.shape.is_static()


def test_nothing_to_fix_is_the_same_graph() -> None:
    one = graph()
    assert fix_dims(one, None) is one
    assert fix_dims(one, {}) is one


@pytest.mark.parametrize(
    ("extents", "words"),
    [({"bach": 1}, "no dynamic dim 'bach'"), ({"batch": 0}, "cannot have the extent 0")],
)
def test_wrong_extents_are_told(extents: dict[str, int], words: str) -> None:
    with pytest.raises(InputError, match=words):
        fix_dims(graph(), extents)


def test_a_static_model_has_nothing_to_fix() -> None:
    toy = Toy(x=[2, 4])
    toy.output(toy("Relu", toy.x), "y")
    with pytest.raises(InputError) as caught:
        fix_dims(toy.graph(), {"batch": 1})
    assert "static already" in caught.value.hint


def test_a_bundle_takes_the_extents_it_was_compiled_for(tmp_path: Path) -> None:
    ir.save(graph().model, tmp_path / "m.onnx")
    bundle = hal.compile(tmp_path / "m.onnx", dims={"batch": 1, "n": 2, "m": 1})
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((1, n, 4)).astype(np.float32) for n in (2, 1))
    with bundle.session() as session:
        np.testing.assert_allclose(session.run({"x": x, "y": y})["out"], np.concatenate([x, y], 1))
        with pytest.raises(InputError, match="'x'"):
            session.run({"x": np.zeros((2, 2, 4), np.float32), "y": y})


def test_the_pass_says_what_it_changed() -> None:
    assert FixDims({"batch": 2}).run(graph()).matches >= 2
