"""Small graphs that tests of several packages use."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from hal.ir import IR_VERSION, OPSET, Graph, State


def value(name: str, dims: list[int | str], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    """A typed graph input."""
    return ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(dtype))


def graph_of(
    inputs: list[ir.Value],
    outputs: list[ir.Value],
    nodes: list[ir.Node],
    weights: dict[str, np.ndarray] | None = None,
    state: tuple[State, ...] = (),
) -> Graph:
    """A graph from parts; ``weights`` become initializers of the values of that name."""
    named = {v.name: v for n in nodes for v in n.inputs if v is not None}
    initializers = []
    for name, array in (weights or {}).items():
        item = named[name]
        item.const_value = ir.Tensor(array, name=name)
        item.shape = ir.Shape(array.shape)
        item.type = ir.TensorType(item.const_value.dtype)
        initializers.append(item)
    body = ir.Graph(
        inputs,
        outputs,
        nodes=nodes,
        initializers=initializers,
        opset_imports={"": OPSET},
        name="test",
    )
    return Graph(ir.Model(body, ir_version=IR_VERSION), state)


def mlp(hidden: int = 32, seed: int = 0) -> Graph:
    """``y = relu(x @ w1) @ w2`` with x [batch, hidden]."""
    rng = np.random.default_rng(seed)
    x, w1, w2 = value("x", ["batch", hidden]), ir.Value(name="w1"), ir.Value(name="w2")
    first = ir.node("MatMul", [x, w1], name="first")
    relu = ir.node("Relu", [first.outputs[0]], name="relu")
    second = ir.node("MatMul", [relu.outputs[0], w2], name="second")
    for node, dims in ((first, hidden), (relu, hidden), (second, hidden)):
        node.outputs[0].name = f"{node.name}_out"
        node.outputs[0].shape = ir.Shape(["batch", dims])
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    second.outputs[0].name = "y"
    scale = 1 / np.sqrt(hidden)
    weights = {
        n: (rng.standard_normal((hidden, hidden)) * scale).astype(np.float32) for n in ("w1", "w2")
    }
    return graph_of([x], [second.outputs[0]], [first, relu, second], weights)


def accumulator() -> Graph:
    """State that grows: ``present = concat(past, x)``, ``total = sum(present)``; x [batch, step, 4]."""
    x = value("x", ["batch", "step", 4])
    past = value("past.0.memory", ["batch", "past", 4])
    joined = ir.node("Concat", [past, x], attributes={"axis": 1}, name="join")
    axes = ir.Value(name="axes")
    total = ir.node("ReduceSum", [joined.outputs[0], axes], attributes={"keepdims": 0}, name="sum")
    joined.outputs[0].name, total.outputs[0].name = "present.0.memory", "total"
    for node, dims in ((joined, ["batch", "past + step", 4]), (total, ["batch", 4])):
        node.outputs[0].shape = ir.Shape(dims)
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    state = State(
        "0.memory",
        "past.0.memory",
        "present.0.memory",
        "memory",
        ("batch", "position", "channel"),
        1,
    )
    return graph_of(
        [x, past],
        [total.outputs[0], joined.outputs[0]],
        [joined, total],
        {"axes": np.array([1], np.int64)},
        (state,),
    )
