from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from hal.ir import Graph, State
from hal.passes import FuseCausalConv, Pipeline
from hal.runtime.verification import run_reference

CHANNELS, TAPS = 3, 4
BODY = """
    whole = Concat <axis = -1> (past, x)
    present = Slice (whole, last, end, axis, one)
    out, unused = CausalConvWithState <activation = "silu"> (whole, weight)
    y = Slice (out, new, end, axis, one)
"""


def _graph(body: str = BODY, kept: int = TAPS) -> Graph:
    """A convolution over ``kept`` carried positions, as modelling code with a cache writes it."""
    model = ir.from_proto(
        onnx.parser.parse_model(
            f"""
            <ir_version: 13, opset_import: ["" : 28]>
            conv (float[batch, {CHANNELS}, sequence] x, float[batch, {CHANNELS}, {kept}] past)
              => (float[batch, {CHANNELS}, sequence] y, float[batch, {CHANNELS}, {kept}] present)
              <float[{CHANNELS}, 1, {TAPS}] weight = {{{", ".join(f"{i / 7}" for i in range(12))}}},
               int64[1] last = {{{-kept}}}, int64[1] new = {{{kept}}}, int64[1] axis = {{2}},
               int64[1] end = {{9223372036854775807}}, int64[1] one = {{1}}>
              {{ {body} }}
            """
        )
    )
    for name, value in ir.convenience.create_value_mapping(model.graph).items():
        if name in ("whole", "out"):
            value.shape = ir.Shape(["batch", CHANNELS, f"{kept} + sequence"])
            value.type = ir.TensorType(ir.DataType.FLOAT)
    state = State("conv", "past", "present", "conv", ("batch", "channel", "channel"), None)
    return Graph(model, (state,))


def _steps(*lengths: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal((2, CHANNELS, n), np.float32)} for n in lengths]


@pytest.mark.parametrize("kept", [TAPS - 1, TAPS, TAPS + 2])
def test_the_past_moves_into_the_op_and_unread_positions_are_not_carried(kept: int) -> None:
    graph = _graph(kept=kept)
    fused, _ = Pipeline("test", (FuseCausalConv(),)).run(graph)
    assert [node.op_type for node in fused.nodes()] == ["CausalConvWithState"]
    assert fused.input_specs()["past"].dims == ("batch", CHANNELS, TAPS - 1)
    assert fused.output_specs()["present"].dims == ("batch", CHANNELS, TAPS - 1)
    assert fused.signature().state[0].axes == ("batch", "channel", "position")
    steps = _steps(5, 1, 1, 2)
    before, after = run_reference(graph, steps), run_reference(fused, steps)
    for right, actual in zip(before, after, strict=True):
        np.testing.assert_allclose(actual["y"], right["y"], atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        ("new, end, axis", "one, end, axis"),  # one position more than is new
        ("(whole, weight)", "(whole, weight, , other)"),  # has a past already
    ],
)
def test_another_convolution_stays(change: tuple[str, str]) -> None:
    body = BODY.replace(*change)
    if "other" in body:
        body = "other = Slice (past, one, end, axis, one)\n" + body
    graph = _graph(body)
    if "one, end, axis" in body.split("y = ")[1]:
        graph.graph.outputs[0].shape = ir.Shape(["batch", CHANNELS, "more"])
    result, reports = Pipeline("test", (FuseCausalConv(),)).run(graph)
    assert sum(report.matches for report in reports) == 0
    assert result.node_count() == graph.node_count()


def test_a_state_that_something_else_reads_keeps_its_positions() -> None:
    graph = _graph(BODY.replace("y =", "z =") + "\n sum = ReduceSum (past) \n y = Add (z, sum)")
    z = next(v for n in graph.nodes() for v in n.outputs if v.name == "z")
    z.shape = ir.Shape(["batch", CHANNELS, "sequence"])
    fused, _ = Pipeline("test", (FuseCausalConv(),)).run(graph)
    assert fused.input_specs()["past"].dims == ("batch", CHANNELS, TAPS)
    conv = next(n for n in fused.nodes() if n.op_type == "CausalConvWithState")
    assert conv.inputs[3] is not None
    steps = _steps(3, 1)
    for right, actual in zip(run_reference(graph, steps), run_reference(fused, steps), strict=True):
        np.testing.assert_allclose(actual["y"], right["y"], atol=1e-6)
