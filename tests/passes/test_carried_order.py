from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from hal.ir import Graph, State
from hal.passes import CarriedOrder, Pipeline
from hal.runtime.verification import run_reference

BODY = """
    turned = Transpose <perm = [0, 2, 1]> (past)
    core = Add (turned, x)
    present = Transpose <perm = [0, 2, 1]> (core)
    y = ReduceSum <keepdims = 0> (core, axes)
"""


def _graph(body: str) -> Graph:
    model = ir.from_proto(
        onnx.parser.parse_model(
            f"""
            <ir_version: 13, opset_import: ["" : 28]>
            g (float[batch, 4, 1] x, float[batch, 3, 4] past)
              => (float[batch, 3] y, float[batch, 3, 4] present)
              <int64[1] axes = {{1}}> {{ {body} }}
            """
        )
    )
    state = State("0.sum", "past", "present", "recurrent", ("batch", "head", "channel"), None)
    return Graph(model, (state,))


def test_a_state_is_carried_in_the_order_in_which_it_is_used() -> None:
    graph = _graph(BODY)
    result, _ = Pipeline("test", (CarriedOrder(),)).run(graph)
    assert [node.op_type for node in result.nodes()] == ["Add", "ReduceSum"]
    assert result.input_specs()["past"].dims == ("batch", 4, 3)
    assert result.output_specs()["present"].dims == ("batch", 4, 3)
    assert result.state[0].axes == ("batch", "channel", "head")
    steps = [{"x": np.full((2, 4, 1), i, np.float32)} for i in (1, 2, 3)]
    for right, ours in zip(run_reference(graph, steps), run_reference(result, steps), strict=True):
        np.testing.assert_array_equal(ours["y"], right["y"])


READS_AN_EXTENT = """
    s = Shape <start = 1, end = 2> (past)
    extent = Cast <to = 1> (s)
    turned = Transpose <perm = [0, 2, 1]> (past)
    sum = Add (turned, x)
    core = Mul (sum, extent)
    present = Transpose <perm = [0, 2, 1]> (core)
    y = ReduceSum <keepdims = 0> (core, axes)
"""
READS_ANOTHER_ORDER = """
    turned = Transpose <perm = [0, 2, 1]> (past)
    core = Add (turned, x)
    present = Transpose <perm = [0, 2, 1]> (core)
    both = Add (past, present)
    two = Add (axes, axes)
    y = ReduceSum <keepdims = 0> (both, two)
"""


@pytest.mark.parametrize("body", [READS_AN_EXTENT, READS_ANOTHER_ORDER])
def test_a_state_that_is_read_in_another_way_too_stays(body: str) -> None:
    result, reports = Pipeline("test", (CarriedOrder(),)).run(_graph(body))
    assert reports[0].matches == 0
    assert result.input_specs()["past"].dims == ("batch", 3, 4)
