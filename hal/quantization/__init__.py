"""Quantization as a user asks for it: a recipe, a plan, a budget, data to calibrate on.

The pass is :class:`hal.passes.quantize.Quantize`; here is what decides on its settings.
"""

from hal.quantization.budget import Bound, parse_budget, parse_size
from hal.quantization.driver import Request, parse_request, quantize_graph
from hal.quantization.plan import Plan, plan_of, plan_of_report, read_plan
from hal.quantization.resume import beside, resumable

__all__ = [
    "Bound",
    "Plan",
    "Request",
    "beside",
    "parse_budget",
    "parse_request",
    "parse_size",
    "plan_of",
    "plan_of_report",
    "quantize_graph",
    "read_plan",
    "resumable",
]
