"""Helpers: one-op models from text, and a comparison with ONNX's reference evaluator."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
from onnx.reference import ReferenceEvaluator


def model(text: str) -> onnx.ModelProto:
    """A model at the neutral operator set from the textual form of a graph."""
    return onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 28, "hal" : 1]>\n{text}')


def compare(
    proto: onnx.ModelProto, tolerance: float = 1e-5, **inputs: Any
) -> dict[str, np.ndarray]:
    """Run with TVM alone, check against the reference evaluator, return the outputs."""
    from hal.targets.tvm.direct import compile_model

    actual = compile_model(proto)(inputs)
    expected = ReferenceEvaluator(proto).run(None, inputs)
    for value, wanted in zip(proto.graph.output, expected, strict=True):
        got = actual[value.name]
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape), value.name
        np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance, err_msg=value.name)
    return actual
