"""Graphs in parts give what they give as a whole."""

from __future__ import annotations

import numpy as np
import pytest

from hal.errors import InputError
from hal.ir import Graph
from hal.ir.evaluate import Evaluator, evaluate
from hal.ir.parts import split
from hal.passes import Pipeline
from hal.passes.quantize import Quantize, parse_recipe
from tests.passes.toys import Toy


def quantized(layers: int = 4) -> Graph:
    """Products of 64 x 64 codes, one after the other, around a stream; one weight is used twice."""
    toy = Toy(x=["batch", 64])
    shared, stream = toy.weight(64, 64), toy.x
    for index in range(layers):
        weight = shared if index in (0, layers - 1) else toy.weight(64, 64)
        stream = toy("Add", stream, toy("Tanh", toy("MatMul", stream, weight)))
    toy.output(stream, "y")
    toy.output(toy("Relu", toy.x), "z")
    return Pipeline("test", (Quantize(parse_recipe("w4a16,head=w4a16")),)).run(toy.graph())[0]


def feeds() -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)}


@pytest.mark.parametrize("most", [1, 64 * 64, 2 * 64 * 64])
def test_parts_give_what_the_whole_gives(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = quantized()
    expected = evaluate(graph, feeds())
    monkeypatch.setattr("hal.ir.evaluate._MADE", most)
    pieces = split(graph, list(graph.graph.outputs), most)
    assert len(pieces) == (2 if most > 64 * 64 else 4)
    for piece, _ in pieces:
        codes = [n for n in piece.graph if n.op_type == "DequantizeLinear"]
        assert 1 <= len(codes) <= max(1, most // 64**2)
    found = Evaluator(graph)(feeds())
    assert list(found) == list(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def test_any_value_can_be_asked_for_and_a_missing_input_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph = quantized()
    inner = next(n for n in graph.nodes() if n.op_type == "Tanh").outputs[0].name or ""
    expected = evaluate(graph, feeds(), [inner, "y"])
    monkeypatch.setattr("hal.ir.evaluate._MADE", 1)
    run = Evaluator(graph, [inner, "y"])
    found = run(feeds())
    np.testing.assert_array_equal(found[inner], expected[inner])
    np.testing.assert_array_equal(found["y"], expected["y"])
    with pytest.raises(InputError, match="input 'x' is missing"):
        run({})


def test_a_small_graph_is_not_cut() -> None:
    graph = quantized()
    assert split(graph, list(graph.graph.outputs), 1 << 20) == []
