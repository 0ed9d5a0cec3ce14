"""Lowering of ONNX ops, with no fallback, against ONNX's reference."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

pytest.importorskip("tvm")

from hal.errors import UnsupportedError
from hal.targets.tvm.direct import compile_model
from tests.targets.tvm.support import compare, model


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


def test_shape_arithmetic_becomes_symbolic_and_never_runs() -> None:
    proto = model(
        """g (float[batch, sequence, 8] x) => (float[batch, sequence, 2, 4] y) {
            s = Shape <start = 0, end = 2> (x)
            tail = Constant <value_ints = [-1, 4]> ()
            target = Concat <axis = 0> (s, tail)
            y = Reshape (x, target)
        }"""
    )
    for batch, sequence in ((1, 5), (3, 2)):
        compare(proto, x=_random(batch, sequence, 8))


def test_range_over_past_and_sequence_gives_positions() -> None:
    proto = model(
        """g (int64[batch, sequence] ids, float[batch, 2, past, 4] cache) => (int64[n] y) {
            s = Shape <start = 1, end = 2> (ids)
            p = Shape <start = 2, end = 3> (cache)
            total = Add (s, p)
            first = Squeeze (p)
            last = Squeeze (total)
            one = Constant <value_int = 1> ()
            y = Range (first, last, one)
        }"""
    )
    for past in (0, 3):
        compare(proto, ids=np.zeros((1, 4), np.int64), cache=_random(1, 2, past, 4))


def test_a_reshape_target_may_be_computed_at_run_time() -> None:
    proto = model(
        "g (float[n, 6] x, int64[2] target) => (float[a, b] y) { y = Reshape (x, target) }"
    )
    compare(proto, x=_random(4, 6), target=np.array([-1, 8]))
    compare(proto, x=_random(4, 6), target=np.array([0, 6]))


def test_attention_with_cache_groups_and_causal_frontier() -> None:
    proto = model(
        """g (float[batch, 4, sequence, 8] q, float[batch, 2, sequence, 8] k,
              float[batch, 2, sequence, 6] v, float[batch, 2, past, 8] pk,
              float[batch, 2, past, 6] pv)
            => (float[batch, 4, sequence, 6] y, float[batch, 2, total, 8] nk,
                float[batch, 2, total, 6] nv) {
            y, nk, nv = Attention <is_causal = 1, softcap = 5.0> (q, k, v, , pk, pv)
        }"""
    )
    for batch, sequence, past in ((1, 5, 0), (2, 1, 3)):
        compare(
            proto,
            q=_random(batch, 4, sequence, 8),
            k=_random(batch, 2, sequence, 8),
            v=_random(batch, 2, sequence, 6),
            pk=_random(batch, 2, past, 8),
            pv=_random(batch, 2, past, 6),
        )


def test_weights_take_the_blocked_matrix_product() -> None:
    weight = onnx.numpy_helper.from_array(_random(48, 64), "w")
    proto = model("g (float[rows, 48] x) => (float[rows, 64] y) { y = MatMul (x, w) }")
    proto.graph.initializer.append(weight)
    for rows in (1, 6, 13):
        compare(proto, 1e-4, x=_random(rows, 48))


def test_a_vectorized_convolution_equals_the_reference() -> None:
    proto = model(
        """g (float[1, 4, 10, 16] x, float[8, 2, 3, 3] w, float[8] b) => (float[1, 8, 10, 16] y) {
            y = Conv <group = 2, pads = [1, 1, 1, 1]> (x, w, b)
        }"""
    )
    compare(proto, 1e-4, x=_random(1, 4, 10, 16), w=_random(8, 2, 3, 3), b=_random(8))


def test_an_op_without_kernel_runs_through_its_body() -> None:
    proto = model(
        "g (float[n, 3] x) => (float[n, 3] y) { y = MeanVarianceNormalization <axes = [1]> (x) }"
    )
    compare(proto, 1e-4, x=_random(5, 3))


def test_what_cannot_be_lowered_is_named_with_its_reason() -> None:
    proto = model("g (float[n] x) => (float[m] y, int64[m] i) { y, i = Unique (x) }")
    with pytest.raises(UnsupportedError, match=r"Unique.*no converter"):
        compare(proto, x=_random(4))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.int64])
def test_integer_division_truncates(dtype: type) -> None:
    kind = np.dtype(dtype).name
    proto = model(f"g ({kind}[4] a, {kind}[4] b) => ({kind}[4] y) {{ y = Div (a, b) }}")
    signs = np.array([7, 7, 9, 100])
    compare(proto, a=signs.astype(dtype), b=np.array([2, 3, 4, 7], dtype))


def test_one_hot_of_an_index_out_of_range_has_no_on_value() -> None:
    proto = model(
        """g (int64[n] i, float[2] v) => (float[n, 5] y)
           <int64 depth = {5}> { y = OneHot <axis = 1> (i, depth, v) }"""
    )
    values = np.array([1.0, 3.0], np.float32)
    got = compile_model(proto)({"i": np.array([4, 5, -5, -6, -1]), "v": values})["y"]
    on = np.argwhere(got == 3.0).tolist()
    assert on == [[0, 4], [2, 0], [4, 4]]


def test_tiles_are_right_with_the_widest_vectors_of_this_machine() -> None:
    from hal.targets import resolve
    from hal.targets.tvm.direct import compile_model
    from hal.targets.tvm.target import tvm_target

    target = tvm_target(resolve("host:tvm").descriptor)
    proto = model("g (float[2,3,4,5] x) => (float[14,18,16,10] y) { r = Constant <value_ints = "
                  "[7,6,4,2]> () y = Tile (x, r) }")  # fmt: skip
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
    got = compile_model(proto, target)({"x": x})["y"]
    np.testing.assert_array_equal(got, np.tile(x, (7, 6, 4, 2)))
