"""Recurrent ops on TVM, against ONNX's reference."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("tvm")

from tests.targets.tvm.support import compare, model

RULES = {"linear": (), "gated": ("decay",), "delta": ("beta",), "gated_delta": ("decay", "beta")}


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


@pytest.mark.parametrize(
    ("rule", "decay_width"),
    [
        ("linear", 0),
        ("delta", 0),
        ("gated", 2),
        ("gated", 12),
        ("gated_delta", 2),
        ("gated_delta", 12),
    ],
)
def test_linear_attention_by_each_update_rule(rule: str, decay_width: int) -> None:
    """Two heads of six key and eight value channels, four query heads, a state carried in."""
    decay, beta = ("decay" in RULES[rule]), ("beta" in RULES[rule])
    proto = model(
        f"""g (float[batch, sequence, 24] q, float[batch, sequence, 12] k,
               float[batch, sequence, 16] v, float[batch, 2, 6, 8] past
               {f", float[batch, sequence, {decay_width}] decay" if decay else ""}
               {", float[batch, sequence, 2] beta" if beta else ""})
            => (float[batch, sequence, 32] y, float[batch, 2, 6, 8] present) {{
            y, present = LinearAttention <q_num_heads = 4, kv_num_heads = 2,
                update_rule = "{rule}"> (q, k, v, past, {"decay" if decay else ""}
                {", beta" if beta else ""})
        }}"""
    )
    for batch, length in ((1, 1), (3, 5)):
        inputs = {
            "q": _random(batch, length, 24),
            "k": _random(batch, length, 12) / 4,
            "v": _random(batch, length, 16),
            "past": _random(batch, 2, 6, 8),
        }
        if decay:
            inputs["decay"] = -np.abs(_random(batch, length, decay_width))
        if beta:
            inputs["beta"] = 1 / (1 + np.exp(_random(batch, length, 2)))
        compare(proto, **inputs)


def test_linear_attention_without_a_past_starts_from_zeros() -> None:
    proto = model(
        """g (float[b, s, 6] q, float[b, s, 6] k, float[b, s, 10] v, float[b, s, 2] decay,
              float[b, s, 1] beta) => (float[b, s, 10] y, float[b, 2, 3, 5] present) {
            y, present = LinearAttention <q_num_heads = 2, kv_num_heads = 2, scale = 0.5>
                (q, k, v, , decay, beta)
        }"""
    )
    q, k, v = _random(2, 4, 6), _random(2, 4, 6) / 3, _random(2, 4, 10)
    compare(proto, q=q, k=k, v=v, decay=-np.abs(_random(2, 4, 2)), beta=np.abs(_random(2, 4, 1)))


@pytest.mark.parametrize("activation", ["none", "silu", "swish"])
def test_causal_conv_continues_where_its_state_ended(activation: str) -> None:
    proto = model(
        f"""g (float[batch, 5, sequence] x, float[5, 1, 4] w, float[5] bias,
               float[batch, 5, 3] past)
            => (float[batch, 5, sequence] y, float[batch, 5, 3] present) {{
            y, present = CausalConvWithState <activation = "{activation}"> (x, w, bias, past)
        }}"""
    )
    w, bias = _random(5, 1, 4), _random(5)
    whole = _random(2, 5, 9)
    at_once = compare(proto, x=whole, w=w, bias=bias, past=np.zeros((2, 5, 3), np.float32))
    past, parts = np.zeros((2, 5, 3), np.float32), []
    for start, end in ((0, 1), (1, 3), (3, 9)):
        out = compare(proto, x=whole[..., start:end], w=w, bias=bias, past=past)
        past = out["present"]
        parts.append(out["y"])
    np.testing.assert_allclose(np.concatenate(parts, -1), at_once["y"], atol=1e-6)
    np.testing.assert_array_equal(past, at_once["present"])


def test_causal_conv_without_bias_and_past() -> None:
    proto = model(
        """g (float[batch, 3, sequence] x, float[3, 1, 2] w)
            => (float[batch, 3, sequence] y, float[batch, 3, 1] present) {
            y, present = CausalConvWithState (x, w)
        }"""
    )
    compare(proto, x=_random(2, 3, 4), w=_random(3, 1, 2))
