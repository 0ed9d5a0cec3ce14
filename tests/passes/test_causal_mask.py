from __future__ import annotations

import numpy as np
import pytest

from hal.ir import Graph
from hal.passes import CAUSAL_KEY, WINDOW_KEY, CausalMask, FuseAttention
from tests.passes.toys import Toy, ops, same

LOW = np.float32(np.finfo(np.float32).min)


def toy(past: bool = True) -> Toy:
    t = Toy(q=["b", 2, "s", 8], k=["b", 2, "s", 8], v=["b", 2, "s", 8])
    if past:
        t.add_input("pk", ["b", 2, "p", 8])
        t.add_input("pv", ["b", 2, "p", 8])
    return t


def length(t: Toy, x):
    return t("Squeeze", t("Shape", x, start=2, end=3))


def positions(t: Toy, past: bool):
    """Columns of query positions and a row of key positions."""
    new = length(t, t.q)
    before = length(t, t.pk) if past else np.array(0)
    total = t("Add", new, before)
    query = t("Add", t("Range", np.array(0), new, np.array(1)), before)
    key = t("Range", np.array(0), total, np.array(1))
    return t("Unsqueeze", query, np.array([1])), t("Unsqueeze", key, np.array([0]))


def attend(t: Toy, allowed, past: bool = True, form: str = "additive") -> Graph:
    k = t("Concat", t.pk, t.k, axis=2) if past else t.k
    v = t("Concat", t.pv, t.v, axis=2) if past else t.v
    s = t("Mul", t("MatMul", t.q, t("Transpose", k, perm=[0, 1, 3, 2])), 0.3)
    if form == "additive":
        s = t("Add", s, t("Where", allowed, np.float32(0), LOW))
    else:
        s = t("Where", allowed, s, np.float32(-np.inf))
    t.output(t("MatMul", t("Softmax", s, axis=-1), v), "y")
    if past:
        t.output(k, "present_k")
        t.output(v, "present_v")
    return t.graph()


def attention(graph: Graph, **dims: int):
    result = same(graph, FuseAttention(), CausalMask(), **{"b": 2, "s": 3, "p": 4, **dims})
    (node,) = (n for n in result.nodes() if n.op_type == "Attention")
    return result, node


def is_causal(node) -> bool:
    attribute = node.attributes.get("is_causal")
    return attribute is not None and attribute.value == 1


@pytest.mark.parametrize("past", [True, False])
@pytest.mark.parametrize("form", ["additive", "boolean"])
def test_a_causal_mask_becomes_an_attribute(past: bool, form: str):
    t = toy(past)
    query, key = positions(t, past)
    graph = attend(t, t("LessOrEqual", key, query), past, form)
    result, node = attention(graph)
    assert is_causal(node)
    assert ops(result) == {"Attention": 1}
    for s, p in ((1, 7), (5, 0), (1, 0)):
        attention(graph, s=s, p=p)


def test_how_the_mask_is_computed_does_not_matter():
    t = toy()
    total = t("Add", length(t, t.q), length(t, t.pk))
    side = t("Unsqueeze", total, np.array([0]))
    square = t("ConstantOfShape", t("Concat", side, side, axis=0))
    lower = t("Trilu", t("Add", square, 1.0), upper=0)
    start = t("Unsqueeze", length(t, t.pk), np.array([0]))
    rows = t("Slice", lower, start, np.array([2**63 - 1]), np.array([0]))
    assert is_causal(attention(attend(t, t("Cast", rows, to=9)))[1])


def test_a_stored_triangle_is_a_causal_mask():
    t = toy()
    triangle = t.constant(np.tril(np.ones((64, 64), dtype=bool)))
    start, stop = length(t, t.pk), t("Add", length(t, t.q), length(t, t.pk))
    bounds = [t("Unsqueeze", v, np.array([0])) for v in (start, stop)]
    rows = t("Slice", triangle, *bounds, np.array([0]))
    allowed = t("Slice", rows, np.array([0]), bounds[1], np.array([1]))
    assert is_causal(attention(attend(t, allowed))[1])


@pytest.mark.parametrize("window", [1, 4, 2000])
@pytest.mark.parametrize("past", [True, False])
def test_a_window_stays_a_mask_and_says_so(window: int, past: bool):
    t = toy(past)
    query, key = positions(t, past)
    near = t("Greater", key, t("Sub", query, np.array(window)))
    graph = attend(t, t("And", near, t("LessOrEqual", key, query)), past)
    _, node = attention(graph, s=6)
    assert node.metadata_props[WINDOW_KEY] == str(window)
    assert not is_causal(node)
    assert node.inputs[3].dtype.name == "BOOL"


def test_a_window_too_wide_to_tell_from_causal_stays_plain():
    t = toy()
    query, key = positions(t, True)
    near = t("Greater", key, t("Sub", query, np.array(100_000)))
    _, node = attention(attend(t, t("And", near, t("LessOrEqual", key, query))))
    assert WINDOW_KEY not in node.metadata_props
    assert node.inputs[3] is not None
    assert not is_causal(node)


@pytest.mark.parametrize("kind", ["top left", "later", "block"])
def test_a_mask_that_is_only_almost_causal_stays(kind: str):
    t = toy()
    query, key = positions(t, True)
    if kind == "top left":  # does not count the past
        row = t("Range", np.array(0), length(t, t.q), np.array(1))
        query = t("Unsqueeze", row, np.array([1]))
    elif kind == "later":
        query = t("Add", query, np.array(1))
    else:
        query, key = t("Div", query, np.array(4)), t("Div", key, np.array(4))
    _, node = attention(attend(t, t("LessOrEqual", key, query)))
    assert not is_causal(node)
    assert node.inputs[3] is not None


def test_a_mask_that_reads_data_stays():
    t = toy()
    query, key = positions(t, True)
    padding = t.add_input("padding", ["b", 1, 1, "t"], "BOOL")
    graph = attend(t, t("And", padding, t("LessOrEqual", key, query)))
    _, node = attention(graph, t=7)
    assert node.inputs[3] is not None
    assert not is_causal(node)


def test_a_mask_that_masks_nothing_is_dropped():
    t = toy()
    _, key = positions(t, True)
    graph = attend(t, t("GreaterOrEqual", key, np.array(0)))
    result, node = attention(graph)
    assert ops(result) == {"Attention": 1}
    assert not is_causal(node)


def test_without_a_past_of_the_op_a_causal_mask_stays_and_is_marked():
    t = toy()
    query, key = positions(t, True)
    k = t("Relu", t("Concat", t.pk, t.k, axis=2))  # as when keys are made from a latent
    s = t("MatMul", t.q, t("Transpose", k, perm=[0, 1, 3, 2]))
    s = t("Add", s, t("Where", t("LessOrEqual", key, query), np.float32(0), LOW))
    v = t("Relu", t("Concat", t.pv, t.v, axis=2))
    t.output(t("MatMul", t("Softmax", s, axis=-1), v), "y")
    _, node = attention(t.graph())
    assert node.metadata_props[CAUSAL_KEY] == "1"
    assert not is_causal(node)
    assert node.inputs[3].dtype.name == "BOOL"


def test_a_static_sequence_is_judged_at_its_own_length():
    t = Toy(q=["b", 2, 6, 8], k=["b", 2, 6, 8], v=["b", 2, 6, 8])
    allowed = t.constant(np.tril(np.ones((6, 6), dtype=bool)))
    assert is_causal(attention(attend(t, allowed, past=False))[1])
