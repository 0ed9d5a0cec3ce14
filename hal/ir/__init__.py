"""The intermediate representation: ONNX at a recent opset, carried state, the ``hal`` ops."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hal.ir.signature import Dim, Signature, State, TensorSpec

if TYPE_CHECKING:
    from hal.ir.graph import (
        HAL_DOMAIN,
        IR_VERSION,
        OPSET,
        Graph,
        dtype_from_name,
        dtype_name,
        tensor_spec,
    )
    from hal.ir.verifier import verify
    from hal.ir.view import subgraphs, to_networkx, used_values, value_bytes

__all__ = [
    "HAL_DOMAIN",
    "IR_VERSION",
    "OPSET",
    "Dim",
    "Graph",
    "Signature",
    "State",
    "TensorSpec",
    "dtype_from_name",
    "dtype_name",
    "subgraphs",
    "tensor_spec",
    "to_networkx",
    "used_values",
    "value_bytes",
    "verify",
]

# A process that only runs a build needs no graph: the libraries for graphs take half a second.
_LAZY = {
    "HAL_DOMAIN": "hal.ir.graph",
    "IR_VERSION": "hal.ir.graph",
    "OPSET": "hal.ir.graph",
    "Graph": "hal.ir.graph",
    "dtype_from_name": "hal.ir.graph",
    "dtype_name": "hal.ir.graph",
    "subgraphs": "hal.ir.view",
    "tensor_spec": "hal.ir.graph",
    "to_networkx": "hal.ir.view",
    "used_values": "hal.ir.view",
    "value_bytes": "hal.ir.view",
    "verify": "hal.ir.verifier",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'hal.ir' has no attribute {name!r}")
