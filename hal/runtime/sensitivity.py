"""How far a model's own results move when its first values change in their last bits.

Where activations are rounded or something is chosen (experts, by their scores), results do not
follow from values smoothly: next to a tie, another order of sums rounds up instead of down, or
chooses another expert. How much that matters is the model's own doing, and no build can be held to
less than the reference holds itself to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from hal.ir import Graph

STEPS = ("RoundActivations", "QuantizeLinear", "DynamicQuantizeLinear", "TopK", "ArgMax", "ArgMin")
"""Ops whose results jump."""

_LAST_BITS = 8
"""Noise in units of the dtype's precision: about what another order of sums costs."""

_TRIES = 2


def disturbed(graph: Graph, seed: int) -> Graph:
    """A graph whose first floats, made of inputs that are none or given, have noise.

    A value is multiplied by one plus noise, the same for all its rows.
    """
    result = graph.clone()
    rng = np.random.default_rng(seed)
    carried = {state.input for state in graph.state}
    firsts = [v for v in result.graph.inputs if v.name not in carried and _is_float(v)]
    depends = {v for v in result.graph.inputs if v.name not in carried}
    for node in result.graph:
        inputs = [v for v in node.inputs if v is not None and v in depends]
        if not inputs:
            continue
        depends.update(node.outputs)
        if not any(map(_is_float, inputs)):
            firsts += [v for v in node.outputs if _is_float(v)]
    for index, value in enumerate(firsts):
        _multiply(result.graph, value, f"noise.{index}", rng)
    return result


def _is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()


def _multiply(graph: ir.Graph, value: ir.Value, name: str, rng: np.random.Generator) -> None:
    assert value.dtype is not None
    kind = value.dtype.numpy()
    extent = value.shape[-1] if value.shape is not None and len(value.shape) else 1
    size = (extent,) if isinstance(extent, int) and extent > 1 else ()
    noise = _LAST_BITS * float(ml_dtypes.finfo(kind).eps) * rng.standard_normal(size)
    array = np.asarray(1 + noise, np.float64).astype(kind)
    tensor = ir.Tensor(array, value.dtype, name=name)
    factor = ir.Value(
        name=name, const_value=tensor, type=ir.TensorType(value.dtype), shape=ir.Shape(array.shape)
    )
    graph.register_initializer(factor)
    product = ir.node("Mul", [value, factor], name=name)
    made = product.outputs[0]
    made.name, made.type, made.shape = f"{name}.product", value.type, value.shape
    value.replace_all_uses_with(made)
    product.replace_input_with(0, value)
    maker = value.producer()
    if maker is None:
        graph.insert_before(graph[0], product)
    else:
        graph.insert_after(maker, product)


def movement(graph: Graph, run: Callable[[Graph], Sequence[dict[str, Any]]]) -> dict[str, float]:
    """How far each float output moves, at most; nothing for a graph without jumps.

    ``run`` gives a graph's outputs in calls in a row. The graph is compared with itself, so that an
    error of the passes that made it counts for nothing.
    """
    if not any(node.op_type in STEPS for node in graph.nodes()):
        return {}
    right = run(graph)
    found: dict[str, float] = {}
    for seed in range(_TRIES):
        for before, after in zip(right, run(disturbed(graph, seed)), strict=True):
            for name, value in before.items():
                if isinstance(value, np.ndarray) and value.dtype.kind in "fV" and value.size:
                    finite = np.isfinite(value) & np.isfinite(after[name])
                    error = np.where(finite, value, 0).astype(np.float64) - after[name]
                    far = float(np.abs(error[finite]).max()) if finite.any() else 0.0
                    found[name] = max(found.get(name, 0.0), far)
    return found


__all__ = ["STEPS", "disturbed", "movement"]
