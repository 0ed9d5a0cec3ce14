"""hal.ir.graph: signatures, state and metadata."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from hal.errors import GraphError
from hal.ir import Graph, dtype_from_name, dtype_name
from tests.graphs import accumulator, mlp


def test_signature_hides_the_carried_state() -> None:
    signature = accumulator().signature()
    assert [str(s) for s in signature.inputs] == ["x: float32[batch, step, 4]"]
    assert [s.name for s in signature.outputs] == ["total"]
    assert signature.state[0].growth_axis == 1


def test_state_and_metadata_survive_serialization() -> None:
    graph = accumulator()
    graph.metadata["task"] = "generic"
    proto = ir.serde.serialize_model(graph.stamp())
    again = Graph.from_model(ir.serde.deserialize_model(proto))
    assert again.state == graph.state
    assert again.metadata == graph.metadata


def test_state_that_names_a_lost_value_is_refused() -> None:
    graph = accumulator()
    model = graph.stamp()
    model.graph.inputs[1].name = "renamed"
    with pytest.raises(GraphError, match=r"0\.memory"):
        Graph.from_model(model)


def test_clone_shares_weights_and_nothing_else() -> None:
    graph = mlp()
    copy = graph.clone()
    copy.graph.remove(list(copy.graph)[-1], safe=False)
    assert graph.node_count() == 3
    assert copy.graph.initializers["w1"].const_value is graph.graph.initializers["w1"].const_value


@pytest.mark.parametrize("name", ["float32", "bfloat16", "int4", "bool", "string", "float8_e4m3fn"])
def test_dtype_names_go_both_ways(name: str) -> None:
    assert dtype_name(dtype_from_name(name)) == name


def test_unknown_dtype_names_the_word() -> None:
    with pytest.raises(GraphError, match="float33"):
        dtype_from_name("float33")
