from __future__ import annotations

import math

import numpy as np
import pytest

from hal.passes import FuseAttention
from tests.passes.toys import Toy, ops, same

B, S, T = "b", "s", "t"


def toy(heads: int = 4, kv: int | None = None, dim: int = 8, dv: int = 8) -> Toy:
    kv = heads if kv is None else kv
    return Toy(q=[B, heads, S, dim], k=[B, kv, T, dim], v=[B, kv, T, dv])


def scores(t: Toy, k=None, scale: str = "mul"):
    kt = t("Transpose", t.k if k is None else k, perm=[0, 1, 3, 2])
    if scale == "both":
        return t("MatMul", t("Mul", t.q, 0.6), t("Mul", kt, 0.6))
    if scale == "query":
        return t("MatMul", t("Div", t.q, math.sqrt(8)), kt)
    product = t("MatMul", t.q, kt)
    return t("Mul", product, 0.3) if scale == "mul" else t("Div", product, [2.5])


def finish(t: Toy, s, v=None):
    return t.output(t("MatMul", t("Softmax", s, axis=-1), t.v if v is None else v))


def fused(t: Toy, **dims: int):
    result = same(t.graph(), FuseAttention(), **{"b": 2, "s": 3, "t": 5, **dims})
    nodes = [n for n in result.nodes() if n.op_type == "Attention"]
    return result, nodes[0] if len(nodes) == 1 else None


@pytest.mark.parametrize("scale", ["mul", "div", "query", "both"])
def test_the_scale_is_found_wherever_it_is_applied(scale: str):
    t = toy()
    finish(t, scores(t, scale=scale))
    result, node = fused(t)
    assert ops(result) == {"Attention": 1}
    expected = {"mul": 0.3, "div": 0.4, "query": 1 / math.sqrt(8), "both": 0.36}[scale]
    assert node.attributes["scale"].value == pytest.approx(expected)


def test_values_may_have_another_dim_than_keys():
    t = toy(dv=6)
    finish(t, scores(t))
    assert ops(fused(t)[0]) == {"Attention": 1}


@pytest.mark.parametrize("shape", [[B, 1, S, T], [B, 1, 1, T], [S, T], [1, 4, S, T]])
def test_an_additive_mask_of_any_broadcast_shape_is_the_ops_mask(shape: list):
    t = toy()
    mask = t.add_input("mask", shape)
    finish(t, t("Add", scores(t), mask))
    result, node = fused(t)
    assert ops(result) == {"Attention": 1}
    assert node.inputs[3].name == "mask"


def test_two_masks_are_added():
    t = toy()
    bias, mask = t.add_input("bias", [1, 4, S, T]), t.add_input("mask", [B, 1, 1, T])
    finish(t, t("Add", t("Add", scores(t), bias), mask))
    assert ops(fused(t)[0]) == {"Attention": 1, "Add": 1}


@pytest.mark.parametrize("keep", [True, False])
def test_a_filled_mask_becomes_boolean(keep: bool):
    t = toy()
    flags = t("Greater", t.add_input("m", [B, 1, S, T]), 0.8 if not keep else -0.8)
    s, fill = scores(t), np.float32(-1e30)
    finish(t, t("Where", flags, s, fill) if keep else t("Where", flags, fill, s))
    result, node = fused(t)
    assert ops(result, "Attention", "Softmax", "Where") == {"Attention": 1}
    assert node.inputs[3].dtype.name == "BOOL"


def test_a_small_fill_is_not_a_mask():
    t = toy()
    flags = t("Greater", t.add_input("m", [B, 1, S, T]), 0.0)
    finish(t, t("Where", flags, scores(t), np.float32(-5.0)))
    assert fused(t)[1] is None


def test_a_guard_against_nan_is_part_of_the_op():
    t = toy()
    flags = t("Greater", t.add_input("m", [B, 1, S, T]), 0.0)
    p = t("Softmax", t("Where", flags, scores(t), np.float32(-np.inf)), axis=-1)
    t.output(t("MatMul", t("Where", t("IsNaN", p), np.float32(0), p), t.v))
    assert ops(fused(t)[0], "Attention", "IsNaN", "Where") == {"Attention": 1}


def test_a_soft_cap_is_the_ops_soft_cap():
    t = toy()
    capped = t("Mul", t("Tanh", t("Div", scores(t), 5.0)), 5.0)
    finish(t, t("Add", capped, t.add_input("mask", [B, 1, S, T])))
    result, node = fused(t)
    assert ops(result) == {"Attention": 1}
    assert node.attributes["softcap"].value == pytest.approx(5.0)


def repeated(t: Toy, x, times: int, how: str):
    lifted = t("Unsqueeze", x, np.array([2]))
    if how == "expand":
        lead = t("Shape", x, start=0, end=2)
        tail = t("Shape", x, start=2, end=4)
        many = t("Expand", lifted, t("Concat", lead, np.array([times]), tail, axis=0))
    elif how == "tile":
        many = t("Tile", lifted, np.array([1, 1, times, 1, 1]))
    else:
        many = t("Concat", *[lifted] * times, axis=2)
    first, last = t("Shape", x, start=0, end=1), t("Shape", x, start=2, end=4)
    return t("Reshape", many, t("Concat", first, np.array([2 * times]), last, axis=0))


@pytest.mark.parametrize("how", ["expand", "tile", "concat"])
def test_repeated_heads_are_taken_unrepeated(how: str):
    t = toy(heads=6, kv=2)
    finish(t, scores(t, repeated(t, t.k, 3, how)), repeated(t, t.v, 3, how))
    result, node = fused(t)
    assert ops(result) == {"Attention": 1}
    assert [node.inputs[i].name for i in (1, 2)] == ["k", "v"]


def test_one_key_head_for_all_queries_is_not_expanded():
    t = toy(heads=4, kv=1)
    finish(t, scores(t))
    assert ops(fused(t)[0]) == {"Attention": 1}


def test_heads_tiled_in_the_other_order_are_not_grouped_queries():
    t = toy(heads=4, kv=2)
    k, v = (t("Tile", x, np.array([1, 2, 1, 1])) for x in (t.k, t.v))
    finish(t, scores(t, k), v)
    assert ops(fused(t)[0], "Tile")["Tile"] == 2


def test_a_past_input_becomes_the_ops_past():
    t = Toy(q=[B, 2, S, 8], k=[B, 2, S, 8], v=[B, 2, S, 8], pk=[B, 2, "p", 8], pv=[B, 2, "p", 8])
    k = t("Concat", t.pk, t.k, axis=-2)
    v = t("Concat", t.pv, t.v, axis=2)
    finish(t, scores(t, k), v)
    t.output(k, "present_k")
    t.output(v, "present_v")
    result, node = fused(t, p=4)
    assert ops(result) == {"Attention": 1}
    assert [o.name for o in node.outputs[1:]] == ["present_k", "present_v"]
    assert [o.name for o in result.graph.outputs][1:] == ["present_k", "present_v"]


@pytest.mark.parametrize("mask", [False, True])
def test_batch_and_heads_in_one_axis_are_heads_of_one_sequence(mask: bool):
    t = Toy(q=["n", S, 8], k=["n", T, 8], v=["n", T, 8])
    s = t("Mul", t("MatMul", t.q, t("Transpose", t.k, perm=[0, 2, 1])), 0.3)
    finish(t, t("Add", s, t.add_input("mask", ["n", S, T])) if mask else s)
    result, node = fused(t, n=6)
    assert node is not None
    assert ops(result, "Softmax", "MatMul").total() == 0


def test_keys_from_positions_first_need_one_transpose():
    t = Toy(q=[B, 2, S, 8], k=[B, T, 2, 8], v=[B, 2, T, 8])
    product = t("MatMul", t.q, t("Transpose", t.k, perm=[0, 2, 3, 1]))
    finish(t, t("Mul", product, 0.3))
    result, _ = fused(t)
    assert ops(result) == {"Attention": 1, "Transpose": 1}


@pytest.mark.parametrize("other", ["weights are an output", "softmax over queries", "batch of one"])
def test_what_the_op_cannot_say_stays(other: str):
    t = toy() if other != "batch of one" else Toy(q=[B, 4, S, 8], k=[1, 4, T, 8], v=[1, 4, T, 8])
    p = t("Softmax", scores(t), axis=-2 if other == "softmax over queries" else -1)
    t.output(t("MatMul", p, t.v), "y")
    if other == "weights are an output":
        t.output(p, "p")
    assert fused(t)[1] is None


def test_the_default_scale_of_an_exported_op_is_written_out():
    t = toy(dim=16)
    t.output(t("Attention", t.q, t.k, t.v, is_causal=0))
    _, node = fused(t)
    assert {k: a.value for k, a in node.attributes.items()} == {"scale": 0.25}
