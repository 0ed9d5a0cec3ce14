"""torch operators of the ``hal`` domain, and how exported programs' operators become ours.

``torch.ops.hal.mixture_of_experts`` is what our experts implementation (:mod:`.experts`) calls, so
that a mixture of experts is one node of an exported program and one node of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx.defs
import onnxscript.values
import torch

from hal.frontends import recurrent_ops
from hal.ir import HAL_DOMAIN
from hal.ir.ops import HAL_OPSET


def _op(name: str, inputs: Sequence[str], attributes: Sequence[str] = ()) -> onnxscript.values.Op:
    """An operator that onnxscript's tracer takes; names without types suffice for it."""
    tensors = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"]
    integers = ["tensor(int32)", "tensor(int64)"]
    schema = onnx.defs.OpSchema(
        name,
        HAL_DOMAIN,
        HAL_OPSET,
        inputs=[onnx.defs.OpSchema.FormalParameter(n, "I" if "i:" in n else "T") for n in inputs],
        outputs=[onnx.defs.OpSchema.FormalParameter("y", "T")],
        type_constraints=[("T", tensors, ""), ("I", integers, "")],
        attributes=[
            onnx.defs.OpSchema.Attribute(a, onnx.defs.OpSchema.AttrType.STRING, required=True)
            for a in attributes
        ],
    )
    return onnxscript.values.Op(onnxscript.values.Opset(HAL_DOMAIN, HAL_OPSET), name, schema)


_MIXTURE_OF_EXPERTS = _op(
    "MixtureOfExperts",
    ("x", "i:expert_index", "expert_weight", "gate_up", "down"),
    ("activation",),
)
_GROUPED_MATMUL = _op("GroupedMatMul", ("x", "w", "i:offsets"))

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.nn.functional.relu,
}


@torch.library.custom_op("hal::mixture_of_experts", mutates_args=())
def mixture_of_experts(
    x: torch.Tensor,
    expert_index: torch.Tensor,
    expert_weight: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    activation: str,
) -> torch.Tensor:
    """``hal::MixtureOfExperts`` (see :mod:`hal.ir.ops`) computed eagerly, expert by expert."""
    y = torch.zeros_like(x)
    for expert in range(gate_up.shape[0]):
        token, slot = torch.where(expert_index == expert)
        if token.numel() == 0:
            continue
        gate, up = (x[token] @ gate_up[expert].T).chunk(2, dim=-1)
        out = (_ACTIVATIONS[activation](gate) * up) @ down[expert].T
        y.index_add_(0, token, (out * expert_weight[token, slot, None]).to(y.dtype))
    return y


@mixture_of_experts.register_fake
def _mixture_of_experts_fake(
    x: torch.Tensor,
    expert_index: torch.Tensor,
    expert_weight: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    activation: str,
) -> torch.Tensor:
    return torch.empty_like(x)


def _onnx_mixture_of_experts(
    x: Any, expert_index: Any, expert_weight: Any, gate_up: Any, down: Any, activation: str
) -> Any:
    return _MIXTURE_OF_EXPERTS(x, expert_index, expert_weight, gate_up, down, activation=activation)


def _onnx_grouped_matmul(input: Any, weight: Any, offs: Any) -> Any:
    return _GROUPED_MATMUL(input, weight, offs)


def _onnx_aten_grouped_mm(
    self: Any, mat2: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> Any:
    if offs is None or bias is not None or len(self.shape) != 2 or len(mat2.shape) != 3:
        raise NotImplementedError("grouped_mm other than [T,K] x [E,K,N] with offsets, no bias")
    return _GROUPED_MATMUL(self, mat2, offs)


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Operator overloads → functions that emit our nodes, for ``torch.onnx.export``.

    Operators that other libraries register are included only if they are registered.
    """
    table: dict[Callable[..., Any], Callable[..., Any]] = {
        torch.ops.hal.mixture_of_experts.default: _onnx_mixture_of_experts,
        torch.ops.aten._grouped_mm.default: _onnx_aten_grouped_mm,
        **recurrent_ops.TRANSLATIONS,
    }
    fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    if fallback is not None:
        table[fallback.default] = _onnx_grouped_matmul
    return table
