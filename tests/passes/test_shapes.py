from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hal.ir import HAL_DOMAIN
from hal.ir.evaluate import evaluate
from hal.ir.ops import ensure_functions
from hal.passes import InferShapes, clean_up
from tests.passes.toys import Toy, feeds


def shape_of(t: Toy, value: ir.Value) -> list[int | str | None]:
    t.output(value)
    return [d if isinstance(d, int) else d.value for d in t.graph().graph.outputs[0].shape]


def test_arithmetic_on_extents_stays_symbolic():
    t = Toy(x=["batch", "sequence", 8])
    assert shape_of(t, t("Concat", t.x, t.x, t.x, axis=1)) == ["batch", "3*sequence", 8]


def test_a_reshape_finds_what_is_left():
    t = Toy(x=["batch", "sequence", 8])
    assert shape_of(t, t("Reshape", t.x, np.array([0, -1, 4]))) == ["batch", "2*sequence", 4]


def test_flattening_multiplies_extents():
    t = Toy(x=["batch", "sequence", 8])
    assert shape_of(t, t("Reshape", t.x, np.array([-1, 8]))) == ["batch*sequence", 8]


def test_a_range_has_the_extent_that_it_counts_to():
    t = Toy(x=["batch", "sequence"])
    length = t("Squeeze", t("Shape", t.x, start=1, end=2))
    assert shape_of(t, t("Range", np.array(0), length, np.array(1))) == ["sequence"]


def test_an_extent_that_depends_on_data_is_unknown():
    t = Toy(x=["batch"])
    assert shape_of(t, t("NonZero", t.x)) == [1, None]


def test_dim_names_that_are_no_expressions_are_names():
    t = Toy(x=["input.1 dim", 4])
    assert shape_of(t, t("Relu", t.x)) == ["input.1 dim", 4]


def test_declared_outputs_keep_their_names():
    t = Toy(x=["batch", 4])
    made = t("Relu", t.x)
    made.shape = ir.Shape(["rows", 4])
    assert shape_of(t, made) == ["rows", 4]


def test_ops_of_our_domain_are_inferred_through_their_bodies():
    t = Toy(x=["tokens", 8], w=["tokens", 2])
    index = t.add_input("i", ["tokens", 2], "INT64")
    gate_up, down = t.weight(3, 8, 8), t.weight(3, 8, 4)
    attributes = {"activation": "silu"}
    node = ir.node(
        "MixtureOfExperts", [t.x, index, t.w, gate_up, down], attributes, domain=HAL_DOMAIN
    )
    t._nodes.append(node)
    t.output(node.outputs[0], "y")
    graph = t.graph()
    ensure_functions(graph.model)
    InferShapes().run(graph)
    assert [str(d) for d in graph.graph.outputs[0].shape] == ["tokens", "8"]


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 5),
    axis=st.integers(0, 2),
    start=st.integers(0, 2),
)
def test_inferred_extents_hold_at_run_time(batch: int, length: int, axis: int, start: int):
    t = Toy(x=["batch", "length", 6])
    sliced = t("Slice", t.x, np.array([start]), np.array([2**63 - 1]), np.array([2]))
    joined = t("Concat", sliced, sliced, axis=axis)
    tiled = t("Tile", t("Unsqueeze", joined, np.array([1])), np.array([1, 2, 1, 1]))
    t.output(tiled, "y")
    graph = t.graph()
    found = evaluate(graph, feeds(graph, batch=batch, length=length))["y"].shape
    for extent, actual in zip(graph.graph.outputs[0].shape, found, strict=True):
        if isinstance(extent, ir.SymbolicDim):
            extent = extent.evaluate({"batch": batch, "length": length})
        assert int(extent) == actual


@pytest.mark.parametrize("past", [0, 4])
def test_present_keys_have_past_plus_new_positions(past: int):
    t = Toy(
        q=["b", 2, "s", 4],
        k=["b", 2, "s", 4],
        v=["b", 2, "s", 4],
        pk=["b", 2, "p", 4],
        pv=["b", 2, "p", 4],
    )
    made = t("Attention", t.q, t.k, t.v, None, t.pk, t.pv, outputs=3)
    for index, value in enumerate(made):
        t.output(value, f"y{index}")
    graph = t.graph()
    assert str(graph.graph.outputs[1].shape[2]) == "p + s"
    assert evaluate(graph, feeds(graph, b=1, s=2, p=past))["y1"].shape == (1, 2, past + 2, 4)


def test_a_past_may_be_empty_when_extents_are_compared():
    t = Toy(past=["b", "past", 4])
    length = t("Shape", t.past, start=1, end=2)
    empty = t("Equal", length, np.array([0]))
    t.output(t("Where", empty, np.array([1]), length), "y")
    graph = t.graph()
    result, _ = clean_up().run(graph)
    for past in (0, 3):
        found = evaluate(result, feeds(graph, b=1, past=past))["y"]
        assert found.tolist() == [past or 1]
