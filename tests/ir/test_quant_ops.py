"""Bodies of the quantization ops against plain numpy."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hal import GraphError
from hal.ir import ops


def run(text: str, x: np.ndarray) -> np.ndarray:
    model = ir.serde.deserialize_model(
        onnx.parser.parse_model(f'<ir_version: 13, opset_import: ["": 28, "hal": 1]> {text}')
    )
    ops.ensure_functions(model)
    proto = ir.serde.serialize_model(model)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.sampled_from([0, 16, 32]), st.integers(2, 8))
def test_each_block_of_activations_is_rounded_with_its_own_scale(
    seed: int, block_size: int, bits: int
) -> None:
    x = np.random.default_rng(seed).standard_normal((2, 3, 64)).astype(np.float32)
    x[0, 1, :32] = 0
    y = run(
        f"g (float[A,B,64] x) => (float[A,B,64] y)"
        f" {{ y = hal.RoundActivations <bits = {bits}, block_size = {block_size}> (x) }}",
        x,
    )
    rows = x.reshape(-1, block_size or 64)
    scale = np.abs(rows).max(-1, keepdims=True) / np.float32(2 ** (bits - 1) - 1)
    codes = np.round(rows / np.where(scale == 0, 1, scale))
    np.testing.assert_allclose(y, (codes * scale).reshape(x.shape), rtol=1e-6)


def test_three_bit_codes_come_out_of_their_two_planes() -> None:
    codes = np.random.default_rng(0).integers(0, 8, (5, 2, 48), dtype=np.uint8)
    low = (codes & 3).reshape(5, 2, -1, 4) << np.array([0, 2, 4, 6], np.uint8)
    high = (codes >> 2).reshape(5, 2, -1, 8) << np.arange(8, dtype=np.uint8)
    packed = np.concatenate([low.sum(-1), high.sum(-1)], -1).astype(np.uint8)
    y = run("g (uint8[A,B,C] x) => (uint8[A,B,D] y) { y = hal.UnpackBits (x) }", packed)
    np.testing.assert_array_equal(y, codes)
    y = run("g (uint8[A,B,C] x) => (int8[A,B,D] y) { y = hal.UnpackBits <signed = 1> (x) }", packed)
    np.testing.assert_array_equal(y, codes.astype(np.int8) - 4)


@pytest.mark.parametrize(
    ("op", "attributes"),
    [("RoundActivations", {"bits": "9"}), ("UnpackBits", {"bits": "5"})],
)
def test_widths_that_do_not_exist_are_refused(op: str, attributes: dict[str, str]) -> None:
    with pytest.raises(GraphError, match=op):
        ops.function(op, **attributes)
