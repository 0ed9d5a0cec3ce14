"""ONNX's backend test-suite through ``hal.compile``: a sample always, all of it when asked for."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
import pytest

from hal import conformance as suite
from hal.conformance.cases import Case
from hal.conformance.running import _assert_similar
from hal.runtime.verification import Narrowed

# A few cases each of what goes a different way: kernels, casts, bodies, branches, sequences,
# strings, recurrent ops, quantization, old opsets.
SAMPLE = {
    "attention": "test_attention_3d$|test_attention_4d_gqa$|test_attention_local_window$",
    "bitshift": "test_bitshift_left_uint16",
    "castlike": "test_castlike_FLOAT_to_BFLOAT16",
    "celu": "test_celu",
    "center_crop_pad": "test_center_crop_pad_crop",
    "clip": "test_clip_default_int8_min",
    "conv": "test_basic_conv_with_padding$",
    "depthtospace": "test_depthtospace_example",
    "dequantizelinear": "test_dequantizelinear$|test_dequantizelinear_int4|linear_blocked$",
    "gelu": "test_gelu_tanh_1",
    "groupnormalization": "test_group_normalization_example",
    "if_": "test_if_seq",
    "layernormalization": "test_layer_normalization_2d_axis1",
    "linear_attention": "test_linear_attention_linear$",
    "loop": "test_loop11",
    "lstm": "test_lstm_with_peepholes",
    "negativeloglikelihoodloss": "test_nllloss_NCd1_weight",
    "quantizelinear": "test_quantizelinear$|test_quantizelinear_e4m3fn",
    "rangeop": "test_range_float_type_positive_delta",
    "reducel1": "test_reduce_l1_keep_dims_example",
    "rmsnormalization": "test_rms_normalization_2d_axis0",
    "roialign": "test_roialign_aligned_true",
    "scatterelements": "test_scatter_elements_with_reduction_max",
    "sequence_map": "test_sequence_map_identity_1_sequence",
    "softmax_cross_entropy_loss": "test_sce_mean_weight$",
    "string_concat": "test_string_concat_broadcasting",
    "swiglu": "test_swiglu$",
    "swish": "test_swish$",
    "tensorscatter": "test_tensorscatter$",
    "unique": "test_unique_sorted_with_axis",
}


def sample() -> list[Any]:
    """The sampled cases, without the forms that ONNX itself expanded."""
    pattern = re.compile("|".join(f"(?:{p})" for p in SAMPLE.values()))
    cases = [c for c in suite.node_cases(list(SAMPLE)) if not c.name.endswith("_expanded")]
    return [c for c in cases if pattern.search(c.name) and "expanded" not in c.name]


def test_a_sample_of_the_suite_passes_on_onnxruntime() -> None:
    cases = sample()
    assert len(cases) >= 30
    failed = {}
    for case in cases:
        outcome = suite.run_case(case, "host:onnxruntime", True, native=False)
        if outcome.status != "passed":
            failed[case.name] = outcome.reason
    assert failed == {}


@pytest.mark.parametrize(
    ("module", "name", "fallback"),
    [
        ("onehot", "test_onehot_out_of_range_indices", False),
        ("attention", "test_attention_4d_causal_fp16_expanded", False),
        ("affinegrid", "test_affine_grid_2d", True),
    ],
)
def test_corners_of_the_suite_pass_on_tvm(module: str, name: str, fallback: bool) -> None:
    pytest.importorskip("tvm")
    (case,) = (c for c in suite.node_cases([module]) if c.name == name)
    assert suite.run_case(case, "host:tvm", fallback, native=False).reason == ""


def test_cases_of_a_module_are_found_whatever_was_loaded_before() -> None:
    every = {c.name for c in suite.node_cases()}
    assert len(every) > 1000
    assert {c.name for c in suite.node_cases(["sign"])} == {"test_sign"}


def test_a_wrong_result_is_told_from_an_unsupported_op() -> None:
    (case, *_) = suite.node_cases(["sign"])
    wrong = suite.Case(
        case.name, case.model, lambda: [(i, [-o for o in e]) for i, e in case.data()], 1e-3, 1e-7
    )
    assert suite.run_case(wrong, "host:onnxruntime", True).status == "wrong"
    (decoder, *_) = suite.node_cases(["image_decoder"])
    outcome = suite.run_case(decoder, "host:onnxruntime", False)
    assert outcome.status == "unsupported"
    assert "ImageDecoder" in outcome.reason


def test_a_worker_that_dies_counts_against_its_case_only() -> None:
    import os

    (good, *_) = suite.node_cases(["softsign"])

    def die() -> Any:
        os._exit(9)

    bad = suite.Case("dies", good.model, die, 1e-3, 1e-7)
    outcomes = {o.name: o for o in suite.run_suite([bad, good], "host:onnxruntime", native=False)}
    assert outcomes["dies"].status == "error"
    assert outcomes[good.name].status == "passed"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "fallback", "wanted"),
    [
        ("host:onnxruntime", True, 1420),
        ("host:tvm", True, 1420),
        ("host:tvm", False, 1100),
    ],
)
def test_the_whole_suite_passes(target: str, fallback: bool, wanted: int) -> None:
    cases = suite.node_cases()
    figures = suite.summary(list(suite.run_suite(cases, target, fallback=fallback, jobs=2)))
    assert figures["regressions"] == []
    assert figures["passed"] >= wanted


@pytest.mark.slow
def test_the_image_classifiers_of_the_suite_pass() -> None:
    outcomes = list(suite.run_suite(suite.light_cases(), "host:onnxruntime"))
    assert [o.name for o in outcomes if o.status != "passed"] == []


def test_a_narrowed_type_has_its_own_tolerance_in_a_case() -> None:
    case = Case("c", onnx.ModelProto(), list, 1e-3, 1e-7)
    right, near = np.ones(2, np.float32), np.full(2, 1.01, np.float32)
    narrowed = {"float32": Narrowed("float32", "float16")}
    _assert_similar(case, [right], [near], narrowed)
    with pytest.raises(AssertionError):
        _assert_similar(case, [right], [near], {})
    with pytest.raises(AssertionError):
        _assert_similar(case, [np.ones(2)], [np.full(2, 1.01)], narrowed)
    with pytest.raises(AssertionError, match="1 outputs, expected 2"):
        _assert_similar(case, [right, right], [right], narrowed)
