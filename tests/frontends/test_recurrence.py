"""Recurrent layers of transformers: which states are found, and what their functions become."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.qwen3_next import modeling_qwen3_next as modelling

from hal.errors import ExportError
from hal.frontends import huggingface, recurrence, recurrent_ops
from hal.ir import Graph
from hal.passes import default_pipeline
from hal.runtime.verification import run_reference
from tests import models

BATCH, LENGTH, KEY_HEADS, HEADS, SIZE, WIDTH = 2, 5, 2, 4, 6, 3


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _delta_rule_inputs(length: int) -> dict[str, torch.Tensor]:
    return {
        "q": _random(BATCH, length, KEY_HEADS, SIZE),
        "k": _random(BATCH, length, KEY_HEADS, SIZE),
        "v": _random(BATCH, length, HEADS, WIDTH),
        "g": -_random(BATCH, length, HEADS).abs(),
        "beta": _random(BATCH, length, HEADS).sigmoid(),
    }


@pytest.fixture(scope="module")
def graph() -> Graph:
    """The graph of a model of one recurrent and one attention layer, as the frontend makes it."""
    before = {n: getattr(modelling, n) for n in dir(modelling)}
    graph = huggingface.from_pretrained_model(models.build("qwen3_next"))
    after = {n: getattr(modelling, n) for n in dir(modelling)}
    assert all(after[name] is value for name, value in before.items())
    return graph


def test_a_model_with_recurrent_layers_has_states_of_fixed_and_of_growing_size(
    graph: Graph,
) -> None:
    found = {s.name: (s.kind, s.growth_axis) for s in graph.state}
    assert found == {
        "0.conv": ("conv", None),
        "0.recurrent": ("recurrent", None),
        "1.key": ("key", 2),
        "1.value": ("value", 2),
    }
    specs = graph.input_specs()
    assert specs["past.0.recurrent"].dims == ("batch", 4, 16, 8)
    assert specs["past.1.key"].dims == ("batch", 2, "past", 16)
    kinds = Counter(node.op_type for node in graph.nodes())
    assert (kinds["LinearAttention"], kinds["CausalConvWithState"]) == (1, 1)
    assert not kinds.keys() & {"Scan", "Loop", "If"}  # it holds for every length


def test_passes_leave_one_op_for_each_recurrence_and_its_state_goes_straight_in(
    graph: Graph,
) -> None:
    result, _ = default_pipeline().run(graph)
    nodes = {node.op_type: node for node in result.nodes()}
    carried = {
        "LinearAttention": {3: "past.0.recurrent"},
        "CausalConvWithState": {3: "past.0.conv"},
        "Attention": {4: "past.1.key", 5: "past.1.value"},
    }
    for op_type, inputs in carried.items():
        assert {i: nodes[op_type].inputs[i].name for i in inputs} == inputs
    assert result.input_specs()["past.0.conv"].dims == ("batch", 96, 3)  # four taps look back at 3
    ids = np.random.default_rng(0).integers(0, 256, (2, 6))
    steps = [{"input_ids": ids[:, :1]}, {"input_ids": ids[:, 1:5]}, {"input_ids": ids[:, 5:]}]
    parts = [out["logits"] for out in run_reference(result, steps)]
    (whole,) = run_reference(graph, [{"input_ids": ids}])
    np.testing.assert_allclose(np.concatenate(parts, 1), whole["logits"], atol=1e-5)


@pytest.mark.parametrize("length", [1, LENGTH])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
def test_the_delta_rule_is_that_of_transformers(
    length: int, normalized: bool, with_state: bool
) -> None:
    inputs = _delta_rule_inputs(length)
    options = {
        "initial_state": _random(BATCH, HEADS, SIZE, WIDTH) if with_state else None,
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": normalized,
    }
    expected = modelling.torch_chunk_gated_delta_rule(*inputs.values(), **options)
    actual = recurrence._delta_rule(*inputs.values(), **options)
    for right, ours in zip(expected, actual, strict=True):
        torch.testing.assert_close(ours, right, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [1, LENGTH])
@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.1, 0.6)])
def test_a_state_space_is_that_of_transformers(length: int, limit: tuple[float, float]) -> None:
    groups, size = 2, 6
    inputs = (
        _random(BATCH, length, HEADS, WIDTH),
        _random(BATCH, length, HEADS),
        -_random(HEADS).exp(),
        _random(BATCH, length, groups, size),
        _random(BATCH, length, groups, size),
    )
    options = {
        "chunk_size": 4,
        "D": _random(HEADS),
        "dt_bias": _random(HEADS),
        "dt_softplus": True,
        "dt_limit": limit,
        "initial_states": _random(BATCH, HEADS, WIDTH, size),
        "return_final_states": True,
    }
    expected = modeling_mamba2.mamba2_chunk_scan(*inputs, **options)
    for right, ours in zip(expected, recurrence._state_space(*inputs, **options), strict=True):
        torch.testing.assert_close(ours, right, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("activation", [None, "silu", "gelu"])
def test_the_convolution_is_that_of_transformers(activation: str | None) -> None:
    x, weight, bias = _random(BATCH, 4, LENGTH), _random(4, 3), _random(4)
    expected = modelling.causal_conv1d_fn(x, weight, bias, activation=activation)
    torch.testing.assert_close(
        recurrence._causal_conv(x, weight, bias, activation=activation), expected
    )


def test_sequences_packed_into_one_are_refused() -> None:
    with pytest.raises(ExportError, match="packed into one"):
        recurrence._causal_conv(_random(1, 4, 6), _random(4, 3), seq_idx=torch.zeros(1, 6))
    with pytest.raises(ExportError, match="packed into one"):
        recurrence._delta_rule(*_delta_rule_inputs(3).values(), cu_seqlens=torch.tensor([0, 3]))


@pytest.mark.parametrize("decay_width", [1, SIZE])
def test_linear_attention_means_what_onnx_says(decay_width: int) -> None:
    inputs = {
        "query": _random(BATCH, LENGTH, HEADS * SIZE),
        "key": _random(BATCH, LENGTH, HEADS * SIZE) / 3,
        "value": _random(BATCH, LENGTH, HEADS * WIDTH),
        "past_state": _random(BATCH, HEADS, SIZE, WIDTH),
        "decay": -_random(BATCH, LENGTH, HEADS * decay_width).abs(),
        "beta": _random(BATCH, LENGTH, HEADS).sigmoid(),
    }
    node = onnx.helper.make_node(
        "LinearAttention",
        list(inputs),
        ["y", "present"],
        q_num_heads=HEADS,
        kv_num_heads=HEADS,
        scale=0.5,
    )
    expected = _reference(node, inputs)
    actual = recurrent_ops.linear_attention(*inputs.values(), HEADS, 0.5, "gated_delta")
    for right, ours in zip(expected, actual, strict=True):
        np.testing.assert_allclose(ours.numpy(), right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [1, LENGTH])
def test_causal_convolution_means_what_onnx_says(length: int) -> None:
    inputs = {
        "x": _random(BATCH, 4, length),
        "weight": _random(4, 1, 3),
        "bias": _random(4),
        "past_state": _random(BATCH, 4, 2),
    }
    node = onnx.helper.make_node(
        "CausalConvWithState", list(inputs), ["y", "present"], activation="silu"
    )
    actual = recurrent_ops.causal_conv_with_state(*inputs.values(), "silu")
    for right, ours in zip(_reference(node, inputs), actual, strict=True):
        np.testing.assert_allclose(ours.numpy(), right, atol=1e-5, rtol=1e-5)


def _reference(node: onnx.NodeProto, inputs: dict[str, torch.Tensor]) -> list[np.ndarray]:
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [node],
        "one",
        [onnx.helper.make_tensor_value_info(n, kind, t.shape) for n, t in inputs.items()],
        [onnx.helper.make_tensor_value_info(n, kind, None) for n in node.output],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 28)])
    found = ReferenceEvaluator(model).run(None, {n: t.numpy() for n, t in inputs.items()})
    return [np.asarray(array) for array in found]
