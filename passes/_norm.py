"""What fusions of normalizations share: the radicand, the op, and a weight that comes after."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from hal.passes._edit import Editor, array, operand_orders, producer, single_use
from hal.passes._forms import mean, per_channel, plus_epsilon


def mean_plus_epsilon(value: ir.Value) -> tuple[ir.Value, list[int], float] | None:
    """``(x, axes, epsilon)`` if ``value`` is ``mean(x) + epsilon`` over ``axes``."""
    parts = plus_epsilon(value)
    averaged = mean(parts[0]) if parts is not None else None
    return (*averaged, parts[1]) if parts is not None and averaged is not None else None


def unit_weight(edit: Editor, source: ir.Value, extents: Sequence[int]) -> ir.Value:
    """A weight of ones in the dtype of ``source``."""
    dtype = (source.dtype or ir.DataType.FLOAT).numpy()
    return edit.constant(np.ones(extents, dtype=dtype), "ones")


def attributes(extents: Sequence[int], epsilon: float) -> dict[str, int | float]:
    """Attributes of a normalization over the last axes, whose statistics are float32."""
    return {"axis": -len(extents), "epsilon": epsilon, "stash_type": 1}


def with_inputs(edit: Editor, norm: ir.Node, inputs: list[ir.Value | None], node: ir.Node) -> bool:
    """Put ``norm`` with other inputs in the place of ``node``."""
    kept = {name: attribute.value for name, attribute in norm.attributes.items()}
    result = node.outputs[0]
    return edit.replace(result, edit.op(norm.op_type, inputs, kept, like=result))


def weight_after(op_type: str) -> Callable[[Editor, ir.Node], bool]:
    """The rule that ``op_type(x, ones) * w`` is ``op_type(x, w)``."""

    def rule(edit: Editor, node: ir.Node) -> bool:
        for source, weight in operand_orders(node):
            norm = producer(source, op_type)
            if norm is None or not single_use(source) or len(norm.inputs) > 2:
                continue
            ones = array(norm.inputs[1])
            if ones is None or not np.all(ones == 1) or weight.dtype != source.dtype:
                continue
            if per_channel(weight, list(ones.shape)):
                return with_inputs(edit, norm, [norm.inputs[0], weight], node)
        return False

    return rule
