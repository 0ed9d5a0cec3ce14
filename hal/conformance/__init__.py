"""Whether a target does what it claims: ONNX's test-suite and small models, run through it."""

from hal.conformance.cases import Case, light_cases, node_cases
from hal.conformance.models import ModelCase, model_cases
from hal.conformance.report import page, summary
from hal.conformance.running import STATUSES, Outcome, run_case, run_suite

__all__ = [
    "STATUSES",
    "Case",
    "ModelCase",
    "Outcome",
    "light_cases",
    "model_cases",
    "node_cases",
    "page",
    "run_case",
    "run_suite",
    "summary",
]
