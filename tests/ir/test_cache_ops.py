"""Bodies of the cache ops against loops in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest

from hal.ir import ops
from tests import cache


def run(text: str, feeds: dict[str, Any]) -> np.ndarray:
    model = ir.serde.deserialize_model(
        onnx.parser.parse_model(f'<ir_version: 13, opset_import: ["": 24, "hal": 1]> {text}')
    )
    ops.ensure_functions(model)
    for body in model.functions.values():
        body.opset_imports[""] = 24  # what the runtime has kernels for
    proto = ir.serde.serialize_model(model)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})[0]


TABLES = "int32[B,N] table, int64[B] lengths"


def attention(feeds: dict[str, Any], pool: str = "float", **attributes: Any) -> np.ndarray:
    settings = ", ".join(f"{k} = {v}" for k, v in attributes.items())
    bits = attributes.get("bits", 0)
    tail, more = ("", "")
    if bits:
        tail, more = ", ks, vs", ", float16[P,H,L,K] ks, float16[P,H,L,W] vs"
    return run(
        f"g (float[B,Q,S,C] q, {pool}[P,H,L,D] keys, {pool}[P,H,L,E] values, {TABLES}{more})"
        f" => (float[B,Q,S,V] y) {{ y = hal.CachedAttention <{settings}>"
        f" (q, keys, values, table, lengths{tail}) }}",
        feeds,
    )


def test_write_stores_each_position_in_its_page() -> None:
    p = cache.problem()
    expected = cache.write(p["keys"], p["k"], p["table"], p["lengths"])
    actual = run(
        f"g (float[P,H,L,C] keys, float[B,H,S,C] k, {TABLES}) => (float[P,H,L,C] y)"
        " { y = hal.CacheWrite (keys, k, table, lengths) }",
        p,
    )
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    "attributes", [{}, {"window": 3}, {"softcap": 2.0}, {"window": 5, "softcap": 1.5}]
)
def test_attention_sees_each_row_s_own_past(attributes: dict[str, Any]) -> None:
    p = cache.problem()
    fixed = {k: p[k] for k in ("q", "keys", "values", "table", "lengths")}
    expected = cache.attend(**fixed, scale=0.25, **attributes)
    np.testing.assert_allclose(attention(p, scale=0.25, **attributes), expected, atol=1e-5)


@pytest.mark.parametrize(
    "attributes",
    [{}, {"window": 3}, {"softcap": 2.0}, {"window": 5, "softcap": 1.5}, {"value_size": 12}],
)
def test_dense_bodies_do_the_same_where_a_row_has_a_page(attributes: dict[str, Any]) -> None:
    p = cache.problem(kv_heads=1 if "value_size" in attributes else 2)
    room = p["keys"].shape[2]
    rows = len(p["q"])
    rng = np.random.default_rng(3)
    p["keys"], p["values"] = (
        rng.standard_normal((rows, p[n].shape[1], room * 4, p[n].shape[3])).astype(np.float32)
        for n in ("keys", "values")
    )
    p["table"] = np.arange(rows, dtype=np.int32)[:, None]
    expected = cache.write(p["keys"], p["k"], p["table"], p["lengths"])
    actual = run(
        f"g (float[P,H,L,C] keys, float[B,H,S,C] k, {TABLES}) => (float[P,H,L,C] y)"
        " { y = hal.CacheWrite <dense = 1> (keys, k, table, lengths) }",
        p,
    )
    np.testing.assert_array_equal(actual, expected)
    fixed = {k: p[k] for k in ("q", "keys", "values", "table", "lengths")}
    given = {k: v for k, v in attributes.items() if k != "value_size"}
    if "value_size" in attributes:
        fixed["values"] = p["keys"][..., :12]
        p["values"] = p["keys"]
    right = cache.attend(**fixed, scale=0.25, **given)
    found = attention(p, scale=0.25, dense=1, **attributes)
    np.testing.assert_allclose(found, right, atol=1e-5)


def test_values_may_be_the_first_channels_of_the_keys() -> None:
    p = cache.problem(kv_heads=1)
    fixed = {k: p[k] for k in ("q", "keys", "table", "lengths")}
    expected = cache.attend(**fixed, values=p["keys"][..., :12], scale=0.25)
    actual = attention({**p, "values": p["keys"]}, scale=0.25, value_size=12)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize(("bits", "dtype"), [(8, "int8"), (4, "uint8")])
@pytest.mark.parametrize("size", [0, 12])
def test_quantized_pools_are_read_with_their_scales(bits: int, dtype: str, size: int) -> None:
    p = cache.problem()
    keys, ks, float_keys = cache.quantized(p["keys"], bits, 4)
    values, vs, float_values = cache.quantized(p["values"], bits, 4)
    if size:
        float_values = float_keys[..., :size]
    fixed = {k: p[k] for k in ("q", "table", "lengths")}
    expected = cache.attend(**fixed, keys=float_keys, values=float_values, scale=0.25)
    feeds = {**p, "keys": keys, "values": values, "ks": ks, "vs": vs}
    actual = attention(feeds, dtype, scale=0.25, bits=bits, value_size=size)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_the_newest_positions_are_read_from_pools_of_their_own() -> None:
    p = cache.problem(page=8)
    keys, values = p["keys"].copy(), p["values"].copy()
    late = {"rk": p["keys"] * 0, "rv": p["values"] * 0}
    gone = np.array([max(0, n - 9) for n in p["lengths"]])  # what the recent pools have forgotten
    for b, length in enumerate(p["lengths"]):
        for position in range(length + p["q"].shape[2]):
            page, slot = p["table"][b, position // 8], position % 8
            if position > length - 5:  # as no query looks farther back there
                late_at = position - gone[b]
                late_page = p["table"][b, late_at // 8], late_at % 8
                for pool, mine in (("keys", "rk"), ("values", "rv")):
                    late[mine][late_page[0], :, late_page[1]] = p[pool][page, :, slot]
    fixed = {k: p[k] for k in ("q", "table", "lengths")}
    expected = cache.attend(**fixed, keys=keys, values=values, scale=0.25)
    text = (
        f"g (float[B,Q,S,C] q, float[P,H,L,C] keys, float[P,H,L,C] values, {TABLES},"
        " float[P,H,L,C] rk, float[P,H,L,C] rv, int64[B] rl) => (float[B,Q,S,C] y)"
        " { y = hal.CachedAttention <scale = 0.25, recent = 5>"
        " (q, keys, values, table, lengths, , , rk, rv, table, rl) }"
    )
    actual = run(text, {**p, **late, "rl": p["lengths"] - gone})
    np.testing.assert_allclose(actual, expected, atol=1e-5)
