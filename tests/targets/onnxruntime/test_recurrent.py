"""Recurrent ops on ONNX Runtime, against ONNX's reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from hal.ir import Graph
from hal.targets.onnxruntime.legalize import legalize, uncovered
from tests.targets.onnxruntime.support import executable, parse


def _random(dtype: str, *shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(dtype)


def _linear_attention(kind: str) -> Graph:
    return parse(
        f"""g ({kind}[b, s, 8] q, {kind}[b, s, 8] k, {kind}[b, s, 12] v, {kind}[b, 2, 4, 6] past,
               {kind}[b, s, 2] decay, {kind}[b, s, 2] beta)
            => ({kind}[b, s, 12] y, {kind}[b, 2, 4, 6] present) {{
            y, present = LinearAttention <q_num_heads = 2, kv_num_heads = 2>
                (q, k, v, past, decay, beta)
        }}"""
    )


def _causal_conv(kind: str) -> Graph:
    return parse(
        f"""g ({kind}[b, 4, s] x, {kind}[4, 1, 3] w, {kind}[b, 4, 2] past)
            => ({kind}[b, 4, s] y, {kind}[b, 4, 2] present) {{
            y, present = CausalConvWithState <activation = "silu"> (x, w, , past)
        }}"""
    )


def _inputs(op: str, dtype: str, length: int) -> dict[str, np.ndarray]:
    if op == "CausalConvWithState":
        shapes = {"x": (2, 4, length), "w": (4, 1, 3), "past": (2, 4, 2)}
        return {n: _random(dtype, *shape) for n, shape in shapes.items()}
    shapes = {"q": (2, length, 8), "k": (2, length, 8), "v": (2, length, 12), "past": (2, 2, 4, 6)}
    inputs = {n: _random(dtype, *shape) / np.array(2, dtype) for n, shape in shapes.items()}
    inputs["decay"] = -np.abs(_random(dtype, 2, length, 2))
    inputs["beta"] = np.abs(_random(dtype, 2, length, 2)) / np.array(4, dtype)
    return inputs


@pytest.mark.parametrize("op", ["LinearAttention", "CausalConvWithState"])
@pytest.mark.parametrize(("kind", "dtype"), [("float", "float32"), ("float16", "float16")])
def test_recurrent_ops_carry_their_state_on(op: str, kind: str, dtype: str, tmp_path: Path) -> None:
    """float32 has a kernel of the runtime's own; float16 has the body that ONNX defines."""
    graph = (_linear_attention if op == "LinearAttention" else _causal_conv)(kind)
    legal = legalize(graph)
    assert not list(uncovered(legal.model))
    kinds = {(node.domain, node.op_type) for node in legal.nodes()}
    assert (("com.microsoft", op) in kinds) is (dtype == "float32")
    run = executable(legal, tmp_path)
    reference = ReferenceEvaluator(ir.to_proto(graph.model))
    tolerance = 1e-5 if dtype == "float32" else 5e-3
    past = None
    for length in (5, 1):
        inputs = _inputs(op, dtype, length)
        inputs["past"] = inputs["past"] if past is None else past
        outputs = run.run(inputs)
        for name, right in zip(("y", "present"), reference.run(None, inputs), strict=True):
            np.testing.assert_allclose(outputs[name], right, atol=tolerance, rtol=tolerance)
        past = np.asarray(outputs["present"])
