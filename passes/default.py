"""The pipeline that every model goes through before a target sees it."""

from __future__ import annotations

from hal.descriptor import Descriptor
from hal.passes.assemble import Assemble
from hal.passes.attention import FuseAttention
from hal.passes.base import Pass, Pipeline
from hal.passes.carried_order import CarriedOrder
from hal.passes.causal_conv import FuseCausalConv
from hal.passes.causal_mask import CausalMask
from hal.passes.conv import FoldConv
from hal.passes.cse import CommonSubexpressions
from hal.passes.dce import DeadCode
from hal.passes.fold import Fold
from hal.passes.gated_mlp import FuseGatedMlp
from hal.passes.gelu import FuseGelu
from hal.passes.identity import RemoveIdentities
from hal.passes.kv_cache import KvCache
from hal.passes.layer_norm import FuseLayerNorm
from hal.passes.matmul_bias import CanonicalMatMul
from hal.passes.rms_norm import FuseRmsNorm
from hal.passes.rotary import FuseRotary
from hal.passes.shapes import InferShapes


def clean_up() -> Pipeline:
    """Fold, infer shapes, drop what does nothing, share what is computed twice."""
    return Pipeline(
        "clean up",
        (Fold(), InferShapes(), RemoveIdentities(), CommonSubexpressions(), DeadCode()),
        repeat=3,
    )


def default_pipeline(descriptor: Descriptor | None = None, kv_cache: str = "auto") -> Pipeline:
    """The neutral pipeline: clean up, fuse to ONNX's high-level ops, choose what to carry.

    ``descriptor`` prices what could be carried (:class:`KvCache`); no other neutral pass reads it.
    ``kv_cache`` is that pass's mode, or ``exported`` to carry what the model's own code does.
    """
    steps: tuple[Pass | Pipeline, ...] = (clean_up(), fusions(), clean_up())
    if kv_cache != "exported":
        steps += (KvCache(kv_cache, descriptor), clean_up())
    return Pipeline("default", steps)


def fusions() -> Pipeline:
    """Fuse decomposed forms to ONNX's high-level ops."""
    return Pipeline(
        "fuse",
        (
            Assemble(),
            CanonicalMatMul(),
            FoldConv(),
            FuseCausalConv(),
            CarriedOrder(),
            FuseLayerNorm(),
            FuseRmsNorm(),
            FuseGelu(),
            FuseRotary(),
            FuseAttention(),
            InferShapes(),
            CausalMask(),
            FuseGatedMlp(),
        ),
    )
