"""How far the reference itself moves, and what verification makes of it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from hal.ir import Graph
from hal.ir.evaluate import evaluate
from hal.runtime.sensitivity import disturbed, movement
from hal.runtime.verification import Reference, allow_movement, compare, reference_for
from tests.passes.toys import Toy


def looked_up(*, chosen: bool) -> Graph:
    """Rows of a table whose largest element, of two that are all but equal, picks the result."""
    toy = Toy()
    ids = toy.add_input("ids", ["n"], "INT64")
    table = np.array([[1.0, 1.0 + 1e-7, 0.0, 0.0]], np.float32)
    x = toy("Gather", toy.constant(table), ids)
    if chosen:
        index = toy("ArgMax", x, axis=-1, keepdims=0)
        x = toy("Gather", toy.constant(np.array([[3.0], [5.0], [0.0], [0.0]], np.float32)), index)
    toy.output(toy("Mul", x, np.float32(2)), "y")
    return toy.graph()


def runs(graph: Graph) -> list[dict[str, np.ndarray]]:
    return [evaluate(graph, {"ids": np.zeros(2, np.int64)})]


def test_a_choice_next_to_a_tie_moves_the_result() -> None:
    graph = looked_up(chosen=True)
    assert movement(graph, runs) == {"y": pytest.approx(4.0, rel=1e-4)}


def test_a_graph_without_jumps_is_not_looked_at() -> None:
    graph = looked_up(chosen=False)
    assert movement(graph, runs) == {}


def test_noise_is_in_the_last_bits_and_in_the_first_floats_alone() -> None:
    graph = looked_up(chosen=False)
    changed = disturbed(graph, 0)
    assert [n.op_type for n in changed.graph] == ["Gather", "Mul", "Mul"]
    before, after = runs(graph)[0]["y"], runs(changed)[0]["y"]
    assert not np.array_equal(before, after)
    np.testing.assert_allclose(after, before, rtol=1e-5)


def test_float_inputs_have_noise() -> None:
    toy = Toy(x=["n", 4])
    toy.output(toy("TopK", toy.x, np.array([1]), outputs=2)[0], "y")
    changed = disturbed(toy.graph(), 1)
    assert [n.op_type for n in changed.graph] == ["Mul", "TopK"]
    assert changed.graph[1].inputs[0].dtype is ir.DataType.FLOAT  # type: ignore[union-attr]


def test_a_model_that_gives_no_numbers_cannot_be_verified() -> None:
    toy = Toy(x=["n", 4])
    toy.output(toy("Log", toy("Neg", toy("Abs", toy.x))), "y")
    found = reference_for(toy.graph())
    assert isinstance(found, str)
    assert "'y' as NaN" in found


def test_a_wrong_build_of_a_model_that_jumps_still_fails() -> None:
    """The movement is the graph's own: what it is compared with has no part in it."""
    graph = looked_up(chosen=True)
    steps = ({"ids": np.zeros(2, np.int64)},)
    far = movement(graph, runs)["y"]
    for error, passes in ((far, True), (3 * far, False)):
        wrong = tuple({"y": out["y"] + np.float32(error)} for out in runs(graph))
        figures = {"y": compare("y", runs(graph)[0]["y"], wrong[0]["y"])}
        assert not figures["y"]["passed"]
        allow_movement(figures, graph, Reference(steps, wrong))
        assert figures["y"]["passed"] == passes
