"""Passes: neutral rewrites of a graph, run as pipelines.

::

    graph, reports = default_pipeline().run(graph)

A new pass is one file with one frozen dataclass, one test file, and one line here.
"""

from hal.passes.assemble import Assemble
from hal.passes.attention import FuseAttention
from hal.passes.base import Outcome, Pass, PassReport, Pipeline
from hal.passes.carried_order import CarriedOrder
from hal.passes.causal_conv import FuseCausalConv
from hal.passes.causal_mask import CAUSAL_KEY, WINDOW_KEY, CausalMask
from hal.passes.conv import FoldConv
from hal.passes.cse import CommonSubexpressions
from hal.passes.dce import DeadCode
from hal.passes.default import clean_up, default_pipeline, fusions
from hal.passes.fold import Fold
from hal.passes.gated_mlp import FuseGatedMlp
from hal.passes.gelu import FuseGelu
from hal.passes.identity import RemoveIdentities
from hal.passes.kv_cache import KvCache
from hal.passes.layer_norm import FuseLayerNorm
from hal.passes.matmul_bias import CanonicalMatMul
from hal.passes.pick_positions import PickPositions
from hal.passes.rms_norm import FuseRmsNorm
from hal.passes.rotary import FuseRotary
from hal.passes.shapes import InferShapes

__all__ = [
    "CAUSAL_KEY",
    "WINDOW_KEY",
    "Assemble",
    "CanonicalMatMul",
    "CarriedOrder",
    "CausalMask",
    "CommonSubexpressions",
    "DeadCode",
    "Fold",
    "FoldConv",
    "FuseAttention",
    "FuseCausalConv",
    "FuseGatedMlp",
    "FuseGelu",
    "FuseLayerNorm",
    "FuseRmsNorm",
    "FuseRotary",
    "InferShapes",
    "KvCache",
    "Outcome",
    "Pass",
    "PassReport",
    "PickPositions",
    "Pipeline",
    "RemoveIdentities",
    "clean_up",
    "default_pipeline",
    "fusions",
]
