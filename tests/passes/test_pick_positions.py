"""Logits at chosen positions, against the graph that computes all."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from hal.ir import Graph, State
from hal.ir.evaluate import evaluate
from hal.ir.inline import infer_types
from hal.ir.picks import PICK
from hal.passes.base import Pipeline
from hal.passes.pick_positions import PickPositions

RNG = np.random.default_rng(0)
WEIGHTS = {
    "table": RNG.standard_normal((9, 8), np.float32),
    "head": RNG.standard_normal((8, 9), np.float32),
    "tied": RNG.standard_normal((9, 8), np.float32),
    "bias": RNG.standard_normal((9,), np.float32),
    "cap": np.array([3.0], np.float32),
    "weights": RNG.standard_normal((1, 3, 1), np.float32),
}
CHAINS = {
    "plain": "logits = MatMul (x, head)",
    "tied": "w = Transpose <perm = [1, 0]> (tied) logits = MatMul (x, w)",
    "bias": "p = MatMul (x, head) logits = Add (p, bias)",
    "soft cap": """
        p = MatMul (x, head) d = Div (p, cap) t = Tanh (d) logits = Mul (cap, t)
    """,
    "cast": """
        h = Cast <to = 11> (head) y = Cast <to = 11> (x) p = MatMul (y, h)
        logits = Cast <to = 1> (p)
    """,
}
OTHERS = {
    "used twice": "p = MatMul (x, head) s = Softmax <axis = 1> (p) logits = Add (p, s)",
    "mixes positions": "p = MatMul (x, head) logits = CumSum (p, axis1)",
    "two by position": "p = MatMul (x, head) m = ReduceMax <keepdims = 1> (p) logits = Sub (p, m)",
}


def graph(chain: str, sequence: str = "sequence", task: str = "causal-lm") -> Graph:
    model = onnx.parser.parse_model(
        f"""<ir_version: 13, opset_import: ["": 28]>
        g (int64[batch, {sequence}] ids, float[batch, 8] before)
          => (float[batch, {sequence}, 9] logits, float[batch, 8] after) {{
            axis1 = Constant <value_int = 1> () axes = Constant <value_ints = [1]> ()
            e = Gather (table, ids) c = CumSum (e, axis1) b = Unsqueeze (before, axes)
            x = Add (c, b) after = ReduceSum <keepdims = 0> (x, axes)
            {chain}
        }}"""
    )
    made = ir.serde.deserialize_model(model)
    for value in {v for n in made.graph for v in n.inputs if v is not None}:
        if value.name in WEIGHTS:
            array = WEIGHTS[value.name]
            value.const_value = ir.tensor(array, name=value.name)
            value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.FLOAT)
            made.graph.register_initializer(value)
    infer_types(made)
    state = State("0.sum", "before", "after", "recurrent", ("batch", "channel"), None)
    result = Graph(made, (state,))
    result.metadata["task"] = task
    return result


def picking(source: Graph) -> tuple[Graph, int]:
    made, reports = Pipeline("pick", (PickPositions(),)).run(source)
    return made, reports[0].matches


def feeds(batch: int, length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(length)
    before = rng.standard_normal((batch, 8), np.float32)
    return {"ids": rng.integers(0, 9, (batch, length)), "before": before}


def run(source: Graph, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in evaluate(source, dict(inputs)).items()}


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_picked_positions_have_the_logits_that_they_had(chain: str) -> None:
    source = graph(chain)
    made, matches = picking(source)
    assert matches == 1
    inputs = feeds(3, 5)
    before = run(source, inputs)
    for pick in ([[4], [0], [2]], [[0, 1, 2, 3, 4]] * 3, [[1, 1], [3, 0], [2, 4]]):
        where = np.array(pick, np.int64)
        after = run(made, {**inputs, PICK: where})
        expected = np.take_along_axis(before["logits"], where[..., None], axis=1)
        np.testing.assert_allclose(after["logits"], expected, atol=1e-5)
        np.testing.assert_array_equal(after["after"], before["after"])


def test_the_product_is_done_on_picked_positions_only() -> None:
    made, _ = picking(graph(CHAINS["soft cap"]))
    product = next(n for n in made.graph if n.op_type == "MatMul")
    for value in (product.inputs[0], product.outputs[0], made.graph.outputs[0]):
        assert value is not None
        assert value.shape is not None
        assert str(value.shape[1]) == "picks"


@pytest.mark.parametrize("chain", ["used twice", "mixes positions", "two by position"])
def test_logits_that_come_about_otherwise_are_left_alone(chain: str) -> None:
    source = graph(OTHERS[chain])
    made, matches = picking(source)
    assert matches == 0
    assert [v.name for v in made.graph.inputs] == ["ids", "before"]


def test_constants_that_differ_by_position_are_left_alone() -> None:
    chain = "p = MatMul (x, head) logits = Mul (p, weights)"
    assert picking(graph(chain, sequence="3"))[1] == 0


def test_a_model_of_another_task_is_left_alone() -> None:
    assert picking(graph(CHAINS["plain"], task="generic"))[1] == 0
