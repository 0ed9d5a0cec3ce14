"""Whether a target does what it claims: ONNX's test-suite, small models and the ops of a model."""

from hal.conformance.cases import Case, light_cases, node_cases
from hal.conformance.model_ops import BoundDim, ModelOps, model_ops
from hal.conformance.models import ModelCase, further_cases, model_cases
from hal.conformance.report import page, summary
from hal.conformance.running import (
    BUILT,
    FAILURES,
    STATUSES,
    CaseRunner,
    Outcome,
    fresh_cache,
    run_case,
    run_suite,
)
from hal.conformance.selection import Selection, select

__all__ = [
    "BUILT",
    "FAILURES",
    "STATUSES",
    "BoundDim",
    "Case",
    "CaseRunner",
    "ModelCase",
    "ModelOps",
    "Outcome",
    "Selection",
    "fresh_cache",
    "further_cases",
    "light_cases",
    "model_cases",
    "model_ops",
    "node_cases",
    "page",
    "run_case",
    "run_suite",
    "select",
    "summary",
]
