"""The intermediate representation: ONNX at a recent opset, carried state, the ``hal`` ops."""

from hal.ir.graph import (
    HAL_DOMAIN,
    IR_VERSION,
    OPSET,
    Dim,
    Graph,
    Signature,
    State,
    TensorSpec,
    dtype_from_name,
    dtype_name,
    tensor_spec,
)
from hal.ir.verify import verify
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
