from __future__ import annotations

import numpy as np
import pytest

from hal.passes import FuseRotary, Pipeline
from tests.passes.toys import Toy, ops, same

HEADS, DIM = 2, 8


def angles(t: Toy, dims: int):
    """``[1, s, dims / 2]`` angles of positions 0, 1, …"""
    length = t("Squeeze", t("Shape", t.x, start=2, end=3))
    positions = t("Range", np.array(0), length, np.array(1))
    columns = t("Cast", t("Unsqueeze", positions, np.array([0, 2])), to=1)
    frequencies = (100.0 ** (-np.arange(dims // 2) / dims)).astype(np.float32)
    return t("Mul", columns, frequencies)


def part(t: Toy, x, start: int, stop: int, step: int = 1):
    return t("Slice", x, np.array([start]), np.array([stop]), np.array([-1]), np.array([step]))


def rotate_half(t: Toy, x, dims: int):
    first, second = part(t, x, 0, dims // 2), part(t, x, dims // 2, 2**63 - 1)
    return t("Concat", t("Neg", second), first, axis=-1)


def tables(t: Toy, dims: int, scale: float = 1.0):
    doubled = t("Concat", *[angles(t, dims)] * 2, axis=-1)
    return [t("Unsqueeze", t("Mul", t(op, doubled), scale), np.array([1])) for op in ("Cos", "Sin")]


def rotated(t: Toy, x, dims: int, scale: float = 1.0):
    cos, sin = tables(t, dims, scale)
    return t("Add", t("Mul", x, cos), t("Mul", rotate_half(t, x, dims), sin))


def stacked(t: Toy, first, second, dims: int):
    pair = [t("Unsqueeze", v, np.array([-1])) for v in (first, second)]
    return t("Reshape", t("Concat", *pair, axis=-1), np.array([0, 0, -1, dims]))


@pytest.mark.parametrize("batch", ["b", 1, 3])
@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_the_rotated_half_form_is_fused(batch: str | int, scale: float):
    t = Toy(x=[batch, HEADS, "s", DIM])
    t.output(rotated(t, t.x, DIM, scale))
    result = same(t.graph(), FuseRotary(), b=2, s=5)
    assert ops(result, "RotaryEmbedding", "Neg", "Slice") == {"RotaryEmbedding": 1}


def test_queries_and_keys_share_their_tables():
    t = Toy(x=["b", HEADS, "s", DIM], k=["b", 1, "s", DIM])
    cos, sin = tables(t, DIM)
    for x in (t.x, t.k):
        t.output(t("Add", t("Mul", x, cos), t("Mul", rotate_half(t, x, DIM), sin)))
    result = same(t.graph(), FuseRotary(), b=2, s=5)
    assert ops(result, "RotaryEmbedding", "Cos", "Sin", "Expand") == {
        "RotaryEmbedding": 2,
        "Cos": 1,
        "Sin": 1,
        "Expand": 2,
    }


def test_a_partial_embedding_rotates_the_first_dims():
    t = Toy(x=["b", HEADS, "s", DIM])
    head, tail = part(t, t.x, 0, 4), part(t, t.x, 4, 2**63 - 1)
    t.output(t("Concat", rotated(t, head, 4), tail, axis=-1))
    result = same(t.graph(), FuseRotary(), b=2, s=5)
    (node,) = (n for n in result.nodes() if n.op_type == "RotaryEmbedding")
    assert node.attributes["rotary_embedding_dim"].value == 4
    assert ops(result, "Slice", "Concat")["Slice"] == 0


@pytest.mark.parametrize("split", ["slice", "view"])
def test_the_interleaved_form_is_fused(split: str):
    t = Toy(x=["b", HEADS, "s", DIM])
    if split == "slice":
        even, odd = part(t, t.x, 0, 99, 2), part(t, t.x, 1, 99, 2)
    else:
        view = t("Reshape", t.x, np.array([0, 0, -1, DIM // 2, 2]))
        even, odd = (t("Gather", view, np.array(i), axis=-1) for i in (0, 1))
    angle = t("Unsqueeze", angles(t, DIM), np.array([1]))
    cos, sin = t("Cos", angle), t("Sin", angle)
    real = t("Sub", t("Mul", even, cos), t("Mul", odd, sin))
    imaginary = t("Add", t("Mul", odd, cos), t("Mul", even, sin))
    t.output(stacked(t, real, imaginary, DIM))
    result = same(t.graph(), FuseRotary(), b=2, s=5)
    (node,) = (n for n in result.nodes() if n.op_type == "RotaryEmbedding")
    assert node.attributes["interleaved"].value == 1


def test_halves_written_by_parts_are_fused():
    t = Toy(x=["b", HEADS, "s", DIM])
    x1, x2 = t("Split", t.x, axis=-1, num_outputs=2, outputs=2)
    angle = t("Unsqueeze", angles(t, DIM), np.array([1]))
    cos, sin = t("Cos", angle), t("Sin", angle)
    real = t("Sub", t("Mul", x1, cos), t("Mul", x2, sin))
    imaginary = t("Add", t("Mul", x1, sin), t("Mul", x2, cos))
    t.output(t("Concat", real, imaginary, axis=-1))
    result = same(t.graph(), FuseRotary(), b=2, s=5)
    assert ops(result, "RotaryEmbedding", "Split") == {"RotaryEmbedding": 1}


def test_alternating_dims_written_as_halves_are_reordered_once():
    t = Toy(x=["b", HEADS, "s", DIM])
    even, odd = part(t, t.x, 0, 99, 2), part(t, t.x, 1, 99, 2)
    angle = t("Unsqueeze", angles(t, DIM), np.array([1]))
    cos, sin = t("Cos", angle), t("Sin", angle)
    real = t("Sub", t("Mul", even, cos), t("Mul", odd, sin))
    imaginary = t("Add", t("Mul", odd, cos), t("Mul", even, sin))
    t.output(t("Concat", real, imaginary, axis=-1))
    result = same(t.graph(), FuseRotary(), b=2, s=5)
    assert ops(result, "RotaryEmbedding", "Gather") == {"RotaryEmbedding": 1, "Gather": 1}


def test_heads_after_positions_are_transposed_around_the_op():
    t = Toy(x=["b", "n", "s", 4], y=["b", "s", HEADS, DIM])
    doubled = t("Concat", *[angles(t, DIM)] * 2, axis=-1)
    cos, sin = (t("Unsqueeze", t(op, doubled), np.array([2])) for op in ("Cos", "Sin"))
    turned = t("Add", t("Mul", t.y, cos), t("Mul", rotate_half(t, t.y, DIM), sin))
    t.output(t("Transpose", turned, perm=[0, 2, 1, 3]))
    result = same(t.graph(), FuseRotary(), b=2, s=5, n=1)
    assert ops(result, "RotaryEmbedding", "Transpose") == {"RotaryEmbedding": 1, "Transpose": 1}


def test_a_table_of_constants_is_halved_if_its_halves_are_equal():
    t = Toy(x=["b", HEADS, 5, DIM])
    half = np.random.default_rng(0).standard_normal((5, DIM // 2)).astype(np.float32)
    for table in (np.concatenate([half, half], 1), np.concatenate([half, -half], 1)):
        product = t("Mul", rotate_half(t, t.x, DIM), t.constant(table))
        t.output(t("Add", t("Mul", t.x, t.constant(table)), product))
    result = same(t.graph(), FuseRotary(), b=2)
    assert ops(result)["RotaryEmbedding"] == 1


def test_the_wrong_sign_or_half_is_no_rotation():
    t = Toy(x=["b", HEADS, "s", DIM])
    cos, sin = tables(t, DIM)
    first, second = part(t, t.x, 0, 4), part(t, t.x, 4, 99)
    for pair in ((second, first), (t("Neg", first), second)):
        t.output(t("Add", t("Mul", t.x, cos), t("Mul", t("Concat", *pair, axis=-1), sin)))
    assert ops(same(t.graph(), FuseRotary(), b=2, s=5))["RotaryEmbedding"] == 0


def test_caches_of_an_exported_op_are_given_the_batch_it_asks_for():
    t = Toy(x=["b", HEADS, "s", DIM])
    angle = angles(t, DIM)
    t.output(t("RotaryEmbedding", t.x, t("Cos", angle), t("Sin", angle)))
    graph = t.graph()
    result, _ = Pipeline("p", (FuseRotary(),)).run(graph)
    (node,) = (n for n in result.nodes() if n.op_type == "RotaryEmbedding")
    assert [str(d) for d in node.inputs[1].shape] == ["b", "s", "4"]
