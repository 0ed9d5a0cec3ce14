"""Which nodes are the chip's: asked of a toolkit that is a function."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hal.ir import Graph
from hal.targets.rknn.plain import plain
from hal.targets.rknn.survey import Answer, survey
from tests.passes.toys import Toy

Refuses = Callable[[list[str]], bool]


def toolkit(refuses: Refuses = lambda _: False, processor: tuple[str, ...] = ()) -> _Toolkit:
    return _Toolkit(refuses, processor)


class _Toolkit:
    """Takes all graphs but those whose ops are refused."""

    def __init__(self, refuses: Refuses, processor: tuple[str, ...]) -> None:
        self.refuses, self.processor = refuses, processor
        self.asked: list[list[str]] = []

    def __call__(self, graph: Graph) -> Answer:
        ops = [node.op_type for node in graph.graph]
        self.asked.append(ops)
        if self.refuses(ops):
            return Answer(refused="no")
        place = {op: "CPU" if op in self.processor else "NPU" for op in ops}
        return Answer(
            [(n.op_type, "FLOAT16", place[n.op_type], f"{n.name}#2") for n in graph.graph]
        )


def refused(graph: Graph, ask: _Toolkit) -> dict[str, str]:
    return {node.op_type: reason for node, reason in survey(graph, ask).items()}


def chain(*ops: str) -> Graph:
    toy = Toy(x=[2, 4])
    value = toy.x
    for op in ops:
        value = toy(op, value)
    toy.output(value, "y")
    return plain(toy.graph(), 19)


def test_a_graph_that_the_toolkit_takes_is_asked_once() -> None:
    ask = toolkit()
    assert refused(chain("Relu", "Abs", "Exp"), ask) == {}
    assert ask.asked == [["Relu", "Abs", "Exp"]]


def test_the_node_that_is_refused_is_found_and_the_rest_asked_again() -> None:
    ask = toolkit(lambda ops: "Abs" in ops)
    assert refused(chain("Relu", "Abs", "Exp"), ask) == {"Abs": "rknn-toolkit2 refuses it: no"}
    assert ask.asked[1:] == [["Relu"], ["Abs"], ["Exp"]]


def test_a_node_that_is_refused_in_company_only_goes_with_those_that_look_like_it() -> None:
    ask = toolkit(lambda ops: "Relu" in ops and "Abs" in ops)
    reasons = survey(graph := chain("Relu", "Exp", "Abs", "Tanh", "Abs", "Neg"), ask)
    told = "rknn-toolkit2 takes it alone, but not behind what comes before it: no"
    assert [(n.op_type, reasons.get(n)) for n in graph.graph] == [
        ("Relu", None), ("Exp", None), ("Abs", told), ("Tanh", None), ("Abs", told), ("Neg", None),
    ]  # fmt: skip


def test_no_layer_stays_on_the_processor_unless_it_only_changes_the_shape() -> None:
    toy = Toy(x=[2, 4])
    flat = toy("Reshape", toy("Relu", toy.x), np.array([8], np.int64))
    toy.output(toy("Exp", flat), "y")
    reasons = refused(plain(toy.graph(), 19), toolkit(processor=("Exp", "Reshape")))
    assert reasons == {"Exp": "rknn-toolkit2 runs Exp on the processor, not on the NPU"}


def test_integers_do_not_go_to_the_npu() -> None:
    toy = Toy()
    toy.add_input("x", [2, 3], "INT64")
    rows = toy("Gather", np.ones((9, 4), np.float32), toy.x)
    toy.output(toy("Relu", rows), "y")
    reasons = refused(plain(toy.graph(), 19), toolkit())
    assert reasons == {"Gather": "'x' is int64, and programs of the NPU take float32 (as float16)"}


def test_scalars_do_not_enter_programs() -> None:
    toy = Toy(x=[2, 4], s=[])
    toy.output(toy("Mul", toy("Relu", toy.x), toy.s), "y")
    reasons = refused(plain(toy.graph(), 19), toolkit())
    assert reasons == {"Mul": "'s' is a scalar, which the simulator does not take"}


def test_shapes_that_depend_on_values_do_not_go_to_the_npu() -> None:
    toy = Toy(x=[2, 4])
    places = toy("NonZero", toy.x)
    toy.output(toy("Relu", toy("Cast", places, to=1)), "y")
    reasons = refused(plain(toy.graph(), 19), toolkit())
    assert set(reasons) == {"NonZero", "Cast", "Relu"}
    assert "known only when it runs" in reasons["Relu"]


def quantized() -> Graph:
    """A layer on codes, between float ones."""
    toy = Toy(x=[2, 4])
    scale, zero = np.float32(0.1), np.uint8(128)
    codes = toy("QuantizeLinear", toy("Exp", toy.x), scale, zero)
    coded = toy("DequantizeLinear", codes, scale, zero)
    stored = np.ones((4, 3), np.int8)
    weight = toy("DequantizeLinear", stored, np.full(3, 0.1, np.float32), axis=1)
    toy.output(toy("Abs", toy("MatMul", coded, weight)), "y")
    return plain(toy.graph(), 19)


def test_a_layer_on_codes_is_asked_as_a_whole() -> None:
    ask = toolkit(lambda ops: ops == ["QuantizeLinear"] or ops == ["MatMul"])
    assert refused(quantized(), ask) == {}


def test_codes_have_no_place_alone() -> None:
    """A product that is refused takes what decodes its weights with it, to the host."""
    graph = quantized()
    found = survey(graph, toolkit(lambda ops: "MatMul" in ops))
    (product,) = [n for n in graph.graph if n.op_type == "MatMul"]
    weight = product.inputs[1]
    assert weight is not None
    assert found[product] == "rknn-toolkit2 refuses it: no"
    assert found[weight.producer()] == "what reads it runs on the host"  # type: ignore[index]
    assert len(found) == 2  # the coded activation is decoded on the chip, as float it leaves it


def test_a_node_is_shown_with_what_decodes_its_weights() -> None:
    ask = toolkit(lambda ops: "Abs" in ops)
    survey(quantized(), ask)
    assert ["DequantizeLinear", "MatMul"] in ask.asked
