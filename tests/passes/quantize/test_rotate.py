from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hal.ir import HAL_DOMAIN, Graph
from hal.ir.evaluate import evaluate
from hal.ir.inline import infer_types
from hal.ir.ops import ensure_functions
from hal.passes.base import Pipeline
from hal.passes.quantize import METADATA_KEY, Quantize, parse_recipe, parse_setting, rotate
from hal.passes.quantize.hadamard import Rotation
from hal.passes.quantize.rotate import Rotate
from tests.passes.toys import Toy

RNG = np.random.default_rng(3)

IDS = {"ids": np.arange(40).reshape(2, 20) % 96}


class Model(Toy):
    """Blocks around a residual stream, in the ways in which models write them."""

    def __init__(self, width: int = 64, norm: str = "scale") -> None:
        super().__init__()
        self.width, self.norm_form = width, norm
        self.ids = self.add_input("ids", ["batch", "sequence"], "INT64")

    def weight(self, *dims: int) -> ir.Value:
        return self.constant(RNG.standard_normal(dims).astype(np.float32) * 0.5)

    def scale(self) -> np.ndarray:
        return (1 + 0.5 * RNG.standard_normal(self.width)).astype(np.float32)

    def norm(self, x: ir.Value) -> ir.Value:
        if self.norm_form == "factor":
            ones = np.ones(self.width, np.float32)
            return self("Mul", self("RMSNormalization", x, ones, epsilon=1e-6), self.scale())
        if self.norm_form == "mean":
            return self("LayerNormalization", x, self.scale(), self.scale())
        return self("RMSNormalization", x, self.scale(), epsilon=1e-6)

    def mlp(self, x: ir.Value, *, turned: bool = False) -> ir.Value:
        normed = self.norm(x)
        gate, up = (self("MatMul", normed, self.weight(self.width, 96)) for _ in range(2))
        down = self.weight(96, self.width)
        if turned:
            down = self("Transpose", self.weight(self.width, 96), perm=[1, 0])
        made = self("MatMul", self("Mul", self("Sigmoid", gate), up), down)
        return self("Add", x, made)

    def biased(self, x: ir.Value) -> ir.Value:
        hidden = self("Relu", self("MatMul", self.norm(x), self.weight(self.width, 96)))
        made = self("MatMul", hidden, self.weight(96, self.width))
        return self("Add", x, self("Add", made, self.scale()))

    def experts(self, x: ir.Value) -> ir.Value:
        width = self.width
        flat = self("Reshape", self.norm(x), np.array([-1, width]))
        chances = self("Softmax", self("MatMul", flat, self.weight(width, 4)))
        weights, chosen = self("TopK", chances, np.array([2]), outputs=2)
        gate_up, down = self.weight(4, 64, width), self.weight(4, width, 32)
        made = self("MixtureOfExperts", flat, chosen, weights, gate_up, down, activation="silu")
        self._nodes[-1].domain = HAL_DOMAIN
        shared = self("MatMul", self("Relu", self("MatMul", flat, self.weight(width, 96))),
                      self.weight(96, width))  # fmt: skip
        gate = self("Sigmoid", self("MatMul", flat, self.weight(width, 1)))
        both = self("Add", made, self("Mul", gate, shared))
        return self("Add", x, self("Reshape", both, np.array([2, -1, width])))

    def head(self, x: ir.Value, table: ir.Value | None = None) -> Graph:
        table = self.weight(96, self.width) if table is None else table
        across = self("Transpose", table, perm=[1, 0])
        self.output(self("MatMul", self.norm(x), across), "logits")
        graph = self.graph()
        ensure_functions(graph.model)
        infer_types(graph.model)
        return graph


def llama_like(width: int = 64, *, tied: bool = False) -> Graph:
    toy = Model(width)
    table = toy.weight(96, width)
    x = toy("Gather", table, toy.ids)
    x = toy.mlp(toy.mlp(x), turned=True)
    return toy.head(x, table if tied else None)


def gemma_like() -> Graph:
    toy = Model(norm="factor")
    table = toy.weight(96, 64)
    x = toy("Mul", toy("Gather", table, toy.ids), np.float32(8))
    return toy.head(toy.mlp(toy.mlp(x)), table)


def experts_like() -> Graph:
    toy = Model()
    x = toy("Gather", toy.weight(96, 64), toy.ids)
    return toy.head(toy.experts(toy.mlp(x)))


def positions_like() -> Graph:
    toy = Model(norm="mean")
    places = toy("Unsqueeze", toy("Gather", toy.weight(20, 64), np.arange(20)), np.array([0]))
    x = toy("Add", toy("Gather", toy.weight(96, 64), toy.ids), places)
    return toy.head(toy.biased(toy.biased(x)))


def turned(graph: Graph) -> tuple[Graph, Any]:
    changed, (report,) = Pipeline("test", (Rotate(),)).run(graph)
    return changed, report


def distance(before: Graph, after: Graph) -> float:
    right, found = evaluate(before, IDS)["logits"], evaluate(after, IDS)["logits"]
    return float(np.abs(found - right).max() / np.abs(right).max())


@pytest.mark.parametrize(
    "make",
    [llama_like, lambda: llama_like(48), lambda: llama_like(88), lambda: llama_like(tied=True),
     gemma_like, experts_like, positions_like],
    ids=["llama", "48 channels", "88 channels", "tied", "gemma", "experts", "mean taken off"],
)  # fmt: skip
def test_results_stay_the_same_and_the_stream_is_another(make: Any) -> None:
    graph = make()
    changed, report = turned(graph)
    assert report.matches == 1
    assert distance(graph, changed) < 1e-5
    stream = next(n for n in graph.nodes() if n.op_type.endswith("Normalization")).inputs[0].name
    before, after = (evaluate(g, IDS, [stream])[stream] for g in (graph, changed))
    assert np.abs(before - after).max() > 0.1 * np.abs(before).max()
    norms = [n for n in changed.nodes() if n.op_type.endswith("Normalization")]
    assert {n.op_type for n in norms} == {"RMSNormalization"}
    assert all(np.all(n.inputs[1].const_value.numpy() == 1) for n in norms)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_turned_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    def weights() -> dict[str, np.ndarray]:
        values = turned(llama_like(tied=tied))[0].graph.initializers.values()
        return {v.name or "": v.const_value.numpy() for v in values if v.const_value is not None}

    monkeypatch.setattr(f"{__name__}.RNG", np.random.default_rng(4))
    whole = weights()
    monkeypatch.setattr(f"{__name__}.RNG", np.random.default_rng(4))
    monkeypatch.setattr(rotate, "_AT_ONCE", 300)  # a few rows of 64, and then some that are fewer
    parts = weights()
    assert whole.keys() == parts.keys()
    for name, right in whole.items():
        np.testing.assert_allclose(parts[name], right, rtol=1e-6, atol=1e-6)


def test_a_channel_that_stands_out_does_so_no_more() -> None:
    toy = Model()
    table = toy.weight(96, 64)
    table.const_value.numpy()[:, 5] *= 100
    x = toy("Gather", table, toy.ids)
    graph = toy.head(toy.mlp(x))
    changed, _ = turned(graph)
    name = x.name
    before, after = (np.abs(evaluate(g, IDS, [name])[name]) for g in (graph, changed))
    assert before.max() / before.mean() > 25
    assert after.max() / after.mean() < 5


def test_scales_of_a_table_that_is_looked_up_too_get_a_weight_of_their_own() -> None:
    graph = llama_like(tied=True)
    changed, _ = turned(graph)
    counts = [Counter(n.op_type for n in g.nodes())["MatMul"] for g in (graph, changed)]
    assert counts[1] == counts[0] + 1
    assert changed.weight_bytes() < graph.weight_bytes() + 64 * 64 * 4 + 1024
    step = Quantize(parse_recipe("w4a16+rotate,head=w8a16"))
    report = Pipeline("t", (step,)).run(graph)[0].metadata[METADATA_KEY]
    formats = {x["name"]: x["format"] for x in report["layers"]}
    (basis,) = [name for name in formats if "basis" in name]
    assert formats[basis] == "w8a16-g32"


def post_norm() -> Graph:
    toy = Model()
    x = toy("Gather", toy.weight(96, 64), toy.ids)
    hidden = toy("MatMul", toy.norm(x), toy.weight(64, 64))
    return toy.head(toy("Add", x, toy.norm(hidden)))


def activated() -> Graph:
    toy = Model()
    x = toy("Gather", toy.weight(96, 64), toy.ids)
    return toy.head(toy("Relu", toy.mlp(x)))


def seen_as_result() -> Graph:
    toy = Model()
    x = toy.mlp(toy("Gather", toy.weight(96, 64), toy.ids))
    toy.output(x, "hidden")
    return toy.head(x)


def sums_of_channels() -> Graph:
    toy = Model()
    x = toy.mlp(toy("Gather", toy.weight(96, 64), toy.ids))
    total = toy("ReduceSum", x, np.array([-1]), keepdims=1)
    return toy.head(toy("Mul", x, toy("Sigmoid", total)))


@pytest.mark.parametrize("make", [post_norm, activated, seen_as_result, sums_of_channels])
def test_what_is_no_such_stream_stays_and_the_report_says_why(make: Any) -> None:
    graph = make()
    changed, report = turned(graph)
    assert distance(graph, changed) == 0
    assert report.matches == 0
    assert report.details["streams"].startswith("none: ")


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 200), st.integers(0, 1))
def test_rotations_are_orthogonal_and_spread_every_channel(size: int, axis: int) -> None:
    rotation = Rotation(size)
    matrix = rotation.apply(np.eye(size, dtype=np.float32))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-5)
    assert np.abs(matrix).max() <= np.sqrt(2 / size) + 1e-6
    some = np.random.default_rng(size).standard_normal((size, size)).astype(np.float32)
    wanted = some @ matrix if axis else (some.T @ matrix).T
    np.testing.assert_allclose(rotation.apply(some, axis), wanted, atol=1e-4)


def test_the_option_is_read_written_and_reported() -> None:
    assert str(parse_setting("w4a8:gptq+rotate")) == "w4a8-g32:gptq+rotate"
    recipe = parse_recipe("w2a16+rotate")
    assert parse_recipe(str(recipe)) == recipe
    made, (report,) = Pipeline("t", (Quantize(recipe),)).run(llama_like())
    assert report.details["rotated"] == "64 channels"
    assert made.metadata[METADATA_KEY]["rotated"] == "64 channels"
    assert "rtn+rotate" in {x["method"] for x in made.metadata[METADATA_KEY]["layers"]}
