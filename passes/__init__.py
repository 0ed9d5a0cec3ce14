"""Passes: neutral rewrites of a graph, run as pipelines."""

from hal.passes.base import Outcome, Pass, PassReport, Pipeline
from hal.passes.cse import CommonSubexpressions
from hal.passes.dce import DeadCode
from hal.passes.default import default_pipeline
from hal.passes.fold import Fold
from hal.passes.identity import RemoveIdentities
from hal.passes.shapes import InferShapes

__all__ = [
    "CommonSubexpressions",
    "DeadCode",
    "Fold",
    "InferShapes",
    "Outcome",
    "Pass",
    "PassReport",
    "Pipeline",
    "RemoveIdentities",
    "default_pipeline",
]
