"""One ONNX model straight to a callable, without bundle, partition or fallback: for tests.

run = compile_model(proto)
outputs = run({"x": array})
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
import onnx_ir as ir

from hal.ir import OPSET, Graph
from hal.targets.tvm.compilation import DEFAULT_TARGET, compile_module
from hal.targets.tvm.legalize import legalize
from hal.targets.tvm.lower import lower
from hal.targets.tvm.lowering import Shaping
from hal.targets.tvm.program import Program
from hal.targets.tvm.runtime import tensor as to_tensor
from hal.targets.tvm.storage import to_storage


def compile_model(
    proto: onnx.ModelProto,
    target: Mapping[str, Any] = DEFAULT_TARGET,
    shaping: Shaping | None = None,
) -> Program:
    """Compile every node of ``proto`` for the machine at hand.

    Raises:
        UnsupportedError: a node cannot be lowered.
    """
    return compile_graph(Graph(ir.from_proto(_at_opset(proto))), target, shaping)


def compile_graph(
    graph: Graph,
    target: Mapping[str, Any] = DEFAULT_TARGET,
    shaping: Shaping | None = None,
) -> Program:
    """Compile every node of ``graph`` for the machine at hand; see :func:`compile_model`."""
    shaping = shaping or Shaping()
    lowered = lower(legalize(graph, shaping), shaping)
    weights = []
    for value in lowered.weights:
        tensor = value.const_value
        assert tensor is not None
        weights.append(to_tensor(to_storage(tensor.numpy(), tensor.dtype.name)))
    library = compile_module(lowered.module, target, shaping.lanes)
    return Program(library.jit(), lowered.inputs, lowered.outputs, weights)


def _at_opset(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model in the default operator set of neutral graphs, if ONNX can convert it."""
    versions = {o.domain: o.version for o in proto.opset_import}
    if versions.get("", OPSET) == OPSET:
        return proto
    try:
        return onnx.version_converter.convert_version(proto, OPSET)
    except Exception:  # noqa: BLE001 - the converter raises bare RuntimeErrors of many kinds
        return proto
