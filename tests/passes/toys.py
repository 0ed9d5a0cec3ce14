"""Small decomposed graphs for the tests of passes, and the check that a pass changed no result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from hal.ir import IR_VERSION, OPSET, Graph
from hal.ir.evaluate import evaluate
from hal.passes import InferShapes, Pass, PassReport, Pipeline, clean_up


class Toy:
    """Builds a graph op by op: ``t = Toy(x=["batch", 4]); t.output(t("Relu", t.x))``."""

    def __init__(self, **inputs: Sequence[int | str]) -> None:
        self._inputs: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        self._weights: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._count = 0
        self._rng = np.random.default_rng(7)  # its own: weights do not depend on other tests
        for name, dims in inputs.items():
            self.add_input(name, dims)

    def add_input(self, name: str, dims: Sequence[int | str], dtype: str = "FLOAT") -> ir.Value:
        kind = ir.TensorType(ir.DataType[dtype])
        value = ir.Value(name=name, shape=ir.Shape(dims), type=kind)
        self._inputs.append(value)
        return value

    def __getattr__(self, name: str) -> ir.Value:
        for value in self._inputs:
            if value.name == name:
                return value
        raise AttributeError(name)

    def __call__(self, op: str, *inputs: Any, **attributes: Any) -> ir.Value:
        """Add a node; numbers and arrays among ``inputs`` become constants (float32 by default)."""
        values = [v if v is None or isinstance(v, ir.Value) else self.constant(v) for v in inputs]
        outputs = attributes.pop("outputs", 1)
        node = ir.node(op, values, attributes, num_outputs=outputs)
        for value in node.outputs:
            value.name = self._name()
        self._nodes.append(node)
        return node.outputs[0] if outputs == 1 else list(node.outputs)  # type: ignore[return-value]

    def _name(self) -> str:
        self._count += 1
        return f"v{self._count}"

    def constant(self, data: Any, name: str | None = None) -> ir.Value:
        array = np.asarray(data)
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        tensor = ir.tensor(array)
        value = ir.Value(
            name=name or self._name(),
            shape=tensor.shape,
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self._weights.append(value)
        return value

    def weight(self, *dims: int) -> ir.Value:
        """A constant of random numbers around zero."""
        return self.constant(self._rng.standard_normal(dims).astype(np.float32) * 0.5)

    def output(self, value: ir.Value, name: str | None = None) -> ir.Value:
        if name is not None:
            value.name = name
        self._outputs.append(value)
        return value

    def graph(self) -> Graph:
        for value in self._outputs:
            value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
        body = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=self._weights,
            opset_imports={"": OPSET},
            name="toy",
        )
        graph = Graph(ir.Model(body, ir_version=IR_VERSION))
        InferShapes().run(graph)
        return graph


def feeds(graph: Graph, seed: int = 0, **dims: int) -> dict[str, np.ndarray]:
    """Random inputs; ``dims`` gives the symbolic extents."""
    rng = np.random.default_rng(seed)
    made: dict[str, np.ndarray] = {}
    for value in graph.graph.inputs:
        assert value.shape is not None
        assert value.dtype is not None
        shape = [d if isinstance(d, int) else dims[str(d.value)] for d in value.shape]
        dtype = value.dtype.numpy()
        if dtype.kind in "iu":
            made[value.name or ""] = rng.integers(0, 4, shape).astype(dtype)
        elif dtype.kind == "b":
            made[value.name or ""] = rng.integers(0, 2, shape).astype(dtype)
        else:
            made[value.name or ""] = rng.standard_normal(shape).astype(dtype)
    return made


def largest_difference(before: Graph, after: Graph, inputs: Mapping[str, np.ndarray]) -> float:
    """Largest absolute difference over all outputs, which must agree in name, shape and dtype."""
    wanted, found = evaluate(before, inputs), evaluate(after, inputs)
    assert list(wanted) == list(found)
    worst = 0.0
    for name, array in wanted.items():
        assert found[name].shape == array.shape
        assert found[name].dtype == array.dtype
        if array.size:
            difference = np.abs(found[name].astype(np.float64) - array.astype(np.float64))
            worst = max(worst, float(np.nanmax(difference)))
            assert np.isnan(found[name]).sum() <= np.isnan(array).sum()
    return worst


def apply(graph: Graph, *passes: Pass) -> tuple[Graph, list[PassReport]]:
    """Run the passes between two clean-ups, as the default pipeline does."""
    return Pipeline("test", (clean_up(), *passes, clean_up())).run(graph)


def same(graph: Graph, *passes: Pass, tolerance: float = 1e-5, **dims: int) -> Graph:
    """Run the passes, check that results are equal at two seeds, return the new graph."""
    changed, _ = apply(graph, *passes)
    for seed in (0, 1):
        difference = largest_difference(graph, changed, feeds(graph, seed, **dims))
        assert difference <= tolerance, f"results differ by {difference}"
    return changed


def ops(graph: Graph, *only: str) -> Counter[str]:
    """How often each op type occurs (only those named, if any are)."""
    found = Counter(node.op_type for node in graph.nodes())
    return Counter({k: v for k, v in found.items() if not only or k in only})
