"""Models as they are handed to a worker."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from hal.errors import TargetError
from hal.ir import Graph

IR_VERSION = 10
"""What runtimes of the last two years read."""


def name_nodes(model: ir.Model) -> None:
    """Give every node a name of its own: by it the provider says what it takes."""
    seen: set[str] = set()
    for index, node in enumerate(model.graph.all_nodes()):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_{index}"
        seen.add(node.name)


def stand_alone(graph: Graph) -> tuple[np.ndarray, str]:
    """The model as bytes, and the folder that its external weights are relative to."""
    model = graph.model.clone()
    model.ir_version = IR_VERSION
    folders = {
        str(v.const_value.base_dir)
        for v in model.graph.initializers.values()
        if isinstance(v.const_value, ir.ExternalTensor)
    }
    if len(folders) > 1:
        raise TargetError("weights lie in several folders", "write the bundle again")
    return as_bytes(ir.to_proto(model).SerializeToString()), next(iter(folders), str(Path.cwd()))


def as_bytes(data: bytes) -> np.ndarray:
    """Bytes as an array, which is what messages carry."""
    return np.frombuffer(data, np.uint8)
