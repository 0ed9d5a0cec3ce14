from __future__ import annotations

import onnx_ir as ir
import pytest

from hal.ir import Graph
from hal.targets.onnxruntime.kernels import Kernel, Match, Miss, kernel_table
from hal.targets.onnxruntime.legalize import legalize, uncovered
from hal.targets.onnxruntime.opset import Restatement, restate
from tests.targets.onnxruntime.support import parse


def ops(graph: Graph) -> list[str]:
    return [node.op_type for node in graph.graph.all_nodes()]


def test_an_open_ended_kernel_serves_only_the_schema_it_was_written_for() -> None:
    assert Kernel(20, 2**31 - 1, {}).serves(20)
    assert not Kernel(20, 2**31 - 1, {}).serves(22)
    assert Kernel(13, 18, {}).serves(15)


def test_a_missing_kernel_is_named_with_the_runtime_version() -> None:
    node = parse("g (float[n, 3] x) => (float[n, 3] y) { y = Mish (x) }").graph[0]
    found = kernel_table().match(node, 28)
    assert isinstance(found, Miss)
    assert "has no kernel for Mish" in found.reason


def test_a_dtype_that_a_kernel_lacks_is_cast_to_a_wider_one() -> None:
    node = parse("g (bfloat16[n] x) => (bfloat16[n] y) { y = Exp (x) }").graph[0]
    found = kernel_table().match(node, 28)
    assert isinstance(found, Match)
    assert found.casts == {"T": ir.DataType.FLOAT}


def test_double_is_never_narrowed() -> None:
    node = parse("g (double[n] x) => (double[n] y) { y = Asin (x) }").graph[0]
    assert isinstance(kernel_table().match(node, 28), Miss)


def test_the_opset_stamp_is_lowered_to_the_one_that_has_kernels() -> None:
    legal = legalize(
        parse(
            """g (float[n, 4] x, float s) => (uint8[n, 4] y) { y = QuantizeLinear (x, s) }""",
        )
    )
    assert legal.model.opset_imports[""] < 28
    assert not list(uncovered(legal.model))


def test_the_stamp_goes_far_back_where_an_op_needs_it() -> None:
    legal = legalize(
        parse(
            """g (float[1, c, 8, 8] x, float[k, 4] r, int64[k] b) => (float[k, c, 2, 2] y)
            { y = RoiAlign <output_height = 2, output_width = 2> (x, r, b) }"""
        )
    )
    assert legal.model.opset_imports[""] == 21
    assert not list(uncovered(legal.model))


def test_an_op_without_kernel_is_replaced_by_its_body() -> None:
    legal = legalize(parse("g (float[n, 3] x) => (float[n, 3] y) { y = Mish (x) }"))
    assert "Mish" not in ops(legal)
    assert "Tanh" in ops(legal)
    assert legal.graph.outputs[0].name == "y"


def test_hal_ops_are_replaced_by_their_bodies_and_leave_no_function() -> None:
    legal = legalize(
        parse(
            """g (float[t, 4] x, float[2, 4, 3] w, int32[2] o) => (float[t, 3] y)
            { y = hal.GroupedMatMul (x, w, o) }"""
        )
    )
    assert not legal.model.functions
    assert not list(uncovered(legal.model))


def test_swiglu_uses_the_fused_kernel() -> None:
    legal = legalize(parse("g (float[n] a, float[n] b) => (float[n] y) { y = SwiGLU (a, b) }"))
    assert ops(legal) == ["QuickGelu", "Mul"]


def test_legalizing_twice_changes_nothing() -> None:
    once = legalize(
        parse("g (bfloat16[n] x) => (bfloat16[n] y) { a = Mish (x) y = Celu (a) }"),
    )
    twice = legalize(once)
    assert ops(once) == ops(twice)
    assert once.model.opset_imports == twice.model.opset_imports


def test_the_given_graph_is_left_alone() -> None:
    graph = parse("g (float[n] x) => (float[n] y) { y = Mish (x) }")
    legalize(graph)
    assert ops(graph) == ["Mish"]


def test_nodes_in_branches_are_legalized_too() -> None:
    legal = legalize(
        parse(
            """g (float[n] x, bool c) => (float[n] y) {
            y = If (c) <then_branch = t () => (float[n] a) { a = Mish (x) },
                        else_branch = e () => (float[n] b) { b = Identity (x) }> }"""
        )
    )
    assert "Mish" not in ops(legal)
    assert not list(uncovered(legal.model))


def test_what_nothing_covers_is_named_with_op_and_dtype() -> None:
    legal = legalize(parse("g (double[n] x) => (double[n] y) { y = Asin (x) }"))
    ((node, reason),) = uncovered(legal.model)
    assert node.op_type == "Asin"
    assert "double" in reason


@pytest.mark.parametrize(
    ("text", "target", "works"),
    [
        ("y = Cast <to = 1, saturate = 1> (x)", 20, True),
        ("y = Cast <to = 1, saturate = 0> (x)", 13, False),
        ("y = Mod <fmod = 0> (x, x)", 27, False),
        ("y = Mod <fmod = 1> (x, x)", 27, True),
        ("y = SwiGLU (x, x)", 27, False),
    ],
)
def test_a_node_is_restated_only_if_it_keeps_its_meaning(
    text: str, target: int, works: bool
) -> None:
    node = parse(f"g (float[n] x) => (float[n] y) {{ {text} }}").graph[0]
    assert isinstance(restate(node, 28, target), Restatement) == works


def test_attributes_that_a_version_lacks_are_dropped_at_their_default() -> None:
    node = parse(
        'g (float[n] x) => (float[n] y) { y = Cast <to = 1, round_mode = "up"> (x) }'
    ).graph[0]
    found = restate(node, 28, 23)
    assert isinstance(found, Restatement)
    assert found.drop == ("round_mode",)
