from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from hal.ir import Graph
from hal.ir.evaluate import evaluate
from hal.ir.inline import function_body, infer_types, inline_functions, may_have_body


def model(text: str) -> ir.Model:
    header = '<ir_version: 13, opset_import: ["" : 28, "own" : 1]>'
    return ir.serde.deserialize_model(onnx.parser.parse_model(header + text))


def ops(of: ir.Model) -> list[str]:
    return [node.op_type for node in of.graph.all_nodes()]


def same_results(before: ir.Model, after: ir.Model, **inputs: np.ndarray) -> None:
    expected, actual = (evaluate(Graph(m), inputs) for m in (before, after))
    assert list(expected) == list(actual)
    for name, right in expected.items():
        assert np.allclose(actual[name], right, rtol=1e-5, atol=1e-6)


X = np.linspace(-2, 2, 12, dtype=np.float32).reshape(3, 4)


@pytest.mark.parametrize(
    "text",
    [
        "y = Swish <alpha = 0.5> (x)",
        "y = Elu (x)",
        "y = LayerNormalization (x, s)",
        "y = RMSNormalization <axis = -1> (x, s)",
        "y = Gelu (x)",
        "a = Mish (x) y = Celu (a)",
    ],
)
def test_schema_functions_are_replaced_by_what_defines_them(text: str) -> None:
    before = model(f"g (float[n, 4] x, float[4] s) => (float[n, 4] y) {{ {text} }}")
    after = inline_functions(before, lambda node: node.op_type not in ("Range", "CastLike"))
    assert not set(ops(before)) & set(ops(after))
    same_results(before, after, x=X, s=np.ones(4, np.float32))


def test_only_the_chosen_nodes_are_inlined() -> None:
    before = model("g (float[n] x) => (float[n] y) { a = Mish (x) y = Mish (a) }")
    after = inline_functions(before, lambda node: node.outputs[0].name == "a")
    assert ops(after).count("Mish") == 1
    assert ops(before) == ["Mish", "Mish"]
    same_results(before, after, x=X[0])


LOCAL = """g (float[n] x) => (float[n] y) { a = own.F <k = 2.0> (x) y = own.F (a) }
<domain: "own", opset_import: ["" : 28]> F <k: float = 3.0> (v) => (w)
{ c = Constant <value_float: float = @k> () w = Mul (v, c) }"""


def test_functions_of_the_model_are_inlined_with_attributes_and_defaults() -> None:
    before = model(LOCAL)
    after = inline_functions(before, lambda _: True)
    assert "F" not in ops(after)
    assert evaluate(Graph(after), {"x": X[0]})["y"] == pytest.approx(X[0] * 6)


def test_a_function_that_calls_itself_is_refused() -> None:
    text = LOCAL.replace("w = Mul (v, c)", "w = own.F (v)")
    with pytest.raises(Exception, match=r"[Cc]ycl|without end"):
        inline_functions(model(text), lambda _: True)


def test_bodies_in_branches_are_inlined_too() -> None:
    before = model(
        """g (float[n] x, bool c) => (float[n] y) {
        y = If (c) <then_branch = t () => (float[n] a) { a = Mish (x) },
                    else_branch = e () => (float[n] b) { b = Mish (x) }> }"""
    )
    after = inline_functions(before, lambda _: True)
    assert "Mish" not in ops(after)
    same_results(before, after, x=X[0], c=np.array(False))


def test_optional_outputs_that_nobody_reads_need_no_value() -> None:
    before = model(
        "g (float[n, c] x, int64[n] t) => (float y) { y = SoftmaxCrossEntropyLoss (x, t) }"
    )
    after = inline_functions(before, lambda node: node.op_type != "CastLike")
    assert "SoftmaxCrossEntropyLoss" not in ops(after)
    same_results(before, after, x=X, t=np.array([0, 3, 1]))


def test_new_values_are_named_after_the_output_and_never_twice() -> None:
    after = inline_functions(
        model("g (float[n] x) => (float[n] y) { a = Mish (x) y = Mish (a) }"), lambda _: True
    )
    names = [v.name for n in after.graph for v in n.outputs]
    assert len(names) == len(set(names))
    assert all(
        name == "y" or name == "a" or name.startswith(("a/", "y/")) for name in names if name
    )


def test_weights_are_shared_and_not_read() -> None:
    before = model(
        "g (float[n, 4] x, float[4] s) => (float[n, 4] y) { y = LayerNormalization (x, s) }"
    )
    scale = before.graph.inputs.pop(1)
    missing = ir.ExternalTensor(
        "nowhere.bin", 0, 16, ir.DataType.FLOAT, shape=ir.Shape([4]), name="s"
    )
    scale.const_value = missing
    before.graph.register_initializer(scale)
    after = inline_functions(before, lambda node: node.op_type == "LayerNormalization")
    assert after.graph.initializers["s"].const_value is missing


def test_sequences_keep_their_type_in_inference() -> None:
    made = model("g (float[n] x) => (int64 y) { s = SequenceConstruct (x) y = SequenceLength (s) }")
    infer_types(made)
    assert isinstance(made.graph[0].outputs[0].type, ir.SequenceType)


def test_an_op_without_function_has_no_body() -> None:
    made = model("g (float[n] x) => (float[n] y) { y = Exp (x) }")
    assert not may_have_body(made, made.graph[0])
    assert function_body(made, made.graph[0]) is None
