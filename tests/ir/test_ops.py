"""Bodies of the hal ops against plain numpy."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hal import GraphError
from hal.ir import ops

ACTIVATIONS = {
    "silu": lambda x: x * 0.5 * (1 + np.tanh(x / 2)),
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
}


def experts_model(*activations: str) -> ir.Model:
    """A chain of MixtureOfExperts nodes over the same weights."""
    lines = [
        f"y{i} = hal.MixtureOfExperts <activation = {a!r}>"
        f" ({'x' if i == 0 else f'y{i - 1}'}, index, weight, gate_up, down)".replace("'", '"')
        for i, a in enumerate(activations)
    ]
    last = f"y{len(activations) - 1}"
    text = f"""<ir_version: 13, opset_import: ["": 28, "hal": 1]>
        g (float[T,H] x, int64[T,K] index, float[T,K] weight,
           float[E,I2,H] gate_up, float[E,H,I] down) => (float[T,H] {last})
        {{ {" ".join(lines)} }}"""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    ops.ensure_functions(model)
    return model


def run(model: ir.Model, **feeds: np.ndarray) -> np.ndarray:
    proto = ir.serde.serialize_model(model)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def experts_feeds(tokens: int = 5, experts: int = 3, k: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(tokens)
    return {
        "x": rng.standard_normal((tokens, 8), np.float32),
        "index": rng.integers(0, experts, (tokens, k)),
        "weight": rng.random((tokens, k), np.float32),
        "gate_up": rng.standard_normal((experts, 12, 8), np.float32),
        "down": rng.standard_normal((experts, 8, 6), np.float32),
    }


def experts_reference(f: dict[str, np.ndarray], activation: str) -> np.ndarray:
    y = np.zeros_like(f["x"])
    for t, row in enumerate(f["index"]):
        for slot, e in enumerate(row):
            if e < len(f["down"]):
                gate, up = np.split(f["gate_up"][e] @ f["x"][t], 2)
                out = f["down"][e] @ (ACTIVATIONS[activation](gate) * up)
                y[t] += f["weight"][t, slot] * out
    return y


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_the_body_of_a_mixture_of_experts_is_its_definition(activation: str) -> None:
    feeds = experts_feeds()
    got = run(experts_model(activation), **feeds)
    np.testing.assert_allclose(got, experts_reference(feeds, activation), atol=1e-4)


def test_an_expert_index_out_of_range_contributes_nothing() -> None:
    feeds = experts_feeds()
    feeds["index"][0] = 3
    got = run(experts_model("silu"), **feeds)
    np.testing.assert_array_equal(got[0], 0)
    np.testing.assert_allclose(got, experts_reference(feeds, "silu"), atol=1e-4)


def test_nodes_with_different_attributes_get_bodies_of_their_own() -> None:
    model = experts_model("silu", "relu", "silu")
    assert sorted(model.functions) == [
        ("hal", "MixtureOfExperts", ""),
        ("hal", "MixtureOfExperts", "relu"),
    ]
    feeds = experts_feeds()
    want = feeds["x"]
    for activation in ("silu", "relu", "silu"):
        want = experts_reference({**feeds, "x": want}, activation)
    np.testing.assert_allclose(run(model, **feeds), want, rtol=1e-3, atol=1e-3)


def test_a_model_with_bodies_passes_the_onnx_checker() -> None:
    onnx.checker.check_model(ir.serde.serialize_model(experts_model("gelu")), full_check=True)


def test_bodies_have_no_nodes_whose_output_shape_depends_on_values() -> None:
    for name in ops.HAL_FUNCTIONS:
        used = {node.op_type for node in ops.function(name)}
        assert not used & {"NonZero", "Unique", "Compress", "If", "Loop"}


@settings(max_examples=15, deadline=None)
@given(counts=st.lists(st.integers(0, 4), min_size=1, max_size=5), spare=st.integers(0, 2))
def test_grouped_matmul_multiplies_each_group_by_its_own_matrix(
    counts: list[int], spare: int
) -> None:
    text = """<ir_version: 13, opset_import: ["": 28, "hal": 1]>
        g (float[T,K] x, float[E,K,N] w, int32[E] offsets) => (float[T,N] y)
        { y = hal.GroupedMatMul (x, w, offsets) }"""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    ops.ensure_functions(model)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((sum(counts) + spare, 4), np.float32)
    w = rng.standard_normal((len(counts), 4, 3), np.float32)
    ends = np.cumsum(counts)
    want = np.zeros((len(x), 3), np.float32)
    for expert, end in enumerate(ends):
        rows = slice(end - counts[expert], end)
        want[rows] = x[rows] @ w[expert]
    got = run(model, x=x, w=w, offsets=ends.astype(np.int32))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_an_unknown_activation_is_named_with_a_suggestion() -> None:
    with pytest.raises(GraphError, match="unknown activation 'sillu'") as error:
        ops.function("MixtureOfExperts", activation="sillu")
    assert "silu" in error.value.hint


def test_an_unknown_op_or_attribute_of_the_domain_is_an_error() -> None:
    with pytest.raises(GraphError, match="unknown op hal::MixtureOfExpert"):
        ops.function("MixtureOfExpert")
    with pytest.raises(GraphError, match="no attribute 'act'"):
        ops.function("MixtureOfExperts", act="silu")
