"""Lowering without kernels for vectors: what a scheduler for another kind of chip is given."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("tvm")

import tvm

from hal import frontends
from hal.conformance import model_cases
from hal.ir import OPSET, Graph
from hal.ir.evaluate import evaluate
from hal.passes import default_pipeline
from hal.targets import resolve
from hal.targets.tvm.direct import compile_model
from hal.targets.tvm.legalize import legalize
from hal.targets.tvm.lower import check, lower
from hal.targets.tvm.lowering import Shaping
from tests import cache
from tests.targets.tvm.support import model

PLAIN = Shaping(plain=True)
FOR_VECTORS = ("call_llvm", "T.vectorized", "T.parallel", "T.Broadcast", "T.Ramp", "is_scheduled")


def run(text: str, feeds: dict[str, Any]) -> dict[str, np.ndarray]:
    """Through the same expressions, run by LLVM without a schedule for GPUs."""
    proto = model(text)
    program = compile_model(proto, shaping=PLAIN)
    return program({i.name: feeds[i.name] for i in proto.graph.input})


def attention(p: dict[str, Any], pool: str = "float", more: str = "", **attributes: Any) -> Any:
    settings = ", ".join(f"{k} = {v}" for k, v in attributes.items())
    scales = ", float16[P,H,L,4] ks, float16[P,H,L,4] vs" if attributes.get("bits") else ""
    late = ", ks, vs" if scales else ", , "
    if more:
        scales += ", float[P2,2,L2,16] late_keys, float[P2,2,L2,16] late_values"
        scales += ", int32[B,N2] late_table, int64[B] late_lengths"
    shapes = [p["keys"].shape[3], p["values"].shape[3]]
    return run(
        f"g (float[B,4,S,16] q, {pool}[P,{p['keys'].shape[1]},L,{shapes[0]}] keys,"
        f" {pool}[P,{p['values'].shape[1]},L,{shapes[1]}] values, int32[B,N] table,"
        f" int64[B] lengths{scales}) => (float[B,4,S,V] y)"
        f" {{ y = hal.CachedAttention <scale = 0.25{', ' if settings else ''}{settings}>"
        f" (q, keys, values, table, lengths{late if (more or attributes.get('bits')) else ''}"
        f"{more}) }}",
        p,
    )["y"]


@pytest.mark.parametrize("name", ["mlp", "cnn", "encoder"])
def test_nothing_is_shaped_for_a_processor(name: str, tmp_path: Path) -> None:
    case = next(c for c in model_cases() if c.name == name)
    graph = frontends.load(str(case.write(tmp_path))).graph
    graph, _ = default_pipeline(resolve("h200-sxm").descriptor).run(graph)
    module = lower(legalize(graph, PLAIN), PLAIN).module
    kernels = [f for f in module.functions.values() if isinstance(f, tvm.tirx.PrimFunc)]
    assert kernels
    for kernel in kernels:
        text = kernel.script()
        assert not [word for word in FOR_VECTORS if word in text], text


def test_the_same_graph_has_such_kernels_for_a_processor(tmp_path: Path) -> None:
    case = next(c for c in model_cases() if c.name == "mlp")
    graph = frontends.load(str(case.write(tmp_path))).graph
    module = lower(legalize(graph, Shaping()), Shaping()).module
    texts = [f.script() for f in module.functions.values()]
    assert any(word in text for word in FOR_VECTORS for text in texts)


@pytest.mark.parametrize(
    "attributes", [{}, {"window": 3}, {"softcap": 2.0}, {"window": 5, "softcap": 1.5}]
)
def test_cached_attention_sees_each_row_s_own_past(attributes: dict[str, Any]) -> None:
    p = cache.problem()
    fixed = {k: p[k] for k in ("q", "keys", "values", "table", "lengths")}
    expected = cache.attend(**fixed, scale=0.25, **attributes)
    np.testing.assert_allclose(attention(p, **attributes), expected, atol=1e-5)


def test_values_may_be_the_first_channels_of_the_keys() -> None:
    p = cache.problem(kv_heads=1)
    fixed = {k: p[k] for k in ("q", "keys", "table", "lengths")}
    expected = cache.attend(**fixed, values=p["keys"][..., :12], scale=0.25)
    found = attention({**p, "values": p["keys"]}, value_size=12)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(("bits", "dtype"), [(8, "int8"), (4, "uint8")])
@pytest.mark.parametrize("size", [0, 12])
def test_codes_in_pools_are_widened(bits: int, dtype: str, size: int) -> None:
    p = cache.problem()
    keys, ks, float_keys = cache.quantized(p["keys"], bits, 4)
    values, vs, float_values = cache.quantized(p["values"], bits, 4)
    if size:
        float_values = float_keys[..., :size]
    fixed = {k: p[k] for k in ("q", "table", "lengths")}
    expected = cache.attend(**fixed, keys=float_keys, values=float_values, scale=0.25)
    feeds = {**p, "keys": keys, "values": values, "ks": ks, "vs": vs}
    found = attention(feeds, dtype, bits=bits, value_size=size)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_newest_positions_come_from_pools_of_their_own() -> None:
    p = cache.problem(seed=3)
    shift = np.minimum(p["lengths"], 2)
    rows = np.arange(2, dtype=np.int32)[:, None]
    late = {
        "late_keys": np.zeros((2, 2, 16, 16), np.float32),
        "late_values": np.zeros((2, 2, 16, 16), np.float32),
        "late_table": rows,
        "late_lengths": p["lengths"] - shift,
    }
    for b, position in np.ndindex(2, 16):
        place = p["table"][b, position // 4], slice(None), position % 4
        if position >= shift[b]:
            late["late_keys"][b, :, position - shift[b]] = p["keys"][place]
            late["late_values"][b, :, position - shift[b]] = p["values"][place]
    fixed = {k: p[k] for k in ("q", "keys", "values", "table", "lengths")}
    expected = cache.attend(**fixed, scale=0.25)
    more = ", late_keys, late_values, late_table, late_lengths"
    found = attention({**p, **late}, more=more, recent=2)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("reduction", ["none", "add", "max"])
def test_a_scatter_is_computed_from_the_side_of_its_results(reduction: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 7)).astype(np.float32)
    indices = np.stack([rng.permutation(7)[:3] for _ in range(4)]).astype(np.int64)
    indices[0, 0] -= 7
    updates = rng.standard_normal((4, 3)).astype(np.float32)
    text = (
        "g (float[5,7] x, int64[4,3] i, float[4,3] u) => (float[5,7] y)"
        f' {{ y = ScatterElements <axis = 1, reduction = "{reduction}"> (x, i, u) }}'
    )
    feeds = {"x": x, "i": indices, "u": updates}
    expected = evaluate(Graph(ir.from_proto(model(text))), feeds)["y"]
    np.testing.assert_allclose(run(text, feeds)["y"], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "g (float[4,3] x, int64[2,1] i, float[2,3] u) => (float[4,3] y)"
            " { y = ScatterND (x, i, u) }",
            "one thread's work",
        ),
        (
            "g (float[a,b] x, int64[2] s) => (float[c,d] y) { y = Reshape (x, s) }",
            "would have to come from the device",
        ),
        (
            "g (float[1,S,8] q, float[1,S,8] k, float[1,S,8] v) => (float[1,S,8] y, float[1,2,4,4] p)"
            ' { y, p = LinearAttention <q_num_heads = 2, kv_num_heads = 2, update_rule = "linear">'
            " (q, k, v) }",
            "written for the vectors of a processor",
        ),
    ],
)
def test_what_needs_a_kernel_for_vectors_is_refused_with_the_reason(text: str, reason: str) -> None:
    graph = Graph(ir.from_proto(model(text)))
    (told,) = check(graph.graph, PLAIN).values()
    assert reason in told
    assert not check(graph.graph, Shaping())


def test_an_expert_out_of_range_adds_nothing() -> None:
    rng = np.random.default_rng(0)
    feeds = {
        "x": rng.standard_normal((3, 8)).astype(np.float32),
        "i": np.array([[0, 3], [1, 2], [-1, 0]], np.int64),
        "w": rng.random((3, 2)).astype(np.float32),
        "up": rng.standard_normal((3, 12, 8)).astype(np.float32),
        "down": rng.standard_normal((3, 8, 6)).astype(np.float32),
    }
    found = run(
        "g (float[T,8] x, int64[T,2] i, float[T,2] w, float[3,12,8] up, float[3,8,6] down)"
        ' => (float[T,8] y) { y = hal.MixtureOfExperts <activation = "relu"> (x, i, w, up, down) }',
        feeds,
    )["y"]
    expected = np.zeros((3, 8))
    for t, k in np.ndindex(3, 2):
        e = feeds["i"][t, k]
        if 0 <= e < 3:
            gate, up = np.split(feeds["up"][e] @ feeds["x"][t], 2)
            expected[t] += feeds["w"][t, k] * (feeds["down"][e] @ (np.maximum(gate, 0) * up))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_dim_may_be_called_like_a_word_of_cpp() -> None:
    text = "g (float[new,class] x) => (float[new,class] y) { y = Relu (x) }"
    graph = Graph(ir.from_proto(model(text)))
    assert graph.model.graph.opset_imports[""] == OPSET
    text = lower(graph, PLAIN).module.script()
    assert "new_" in text
    assert "class_" in text
    assert not re.search(
        r"\b(new|class)\b", text.partition("@I.ir_module")[2].replace("class Module", "")
    )
