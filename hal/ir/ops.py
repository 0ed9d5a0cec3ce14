"""The ``hal`` operator domain: ops that ONNX lacks, each with a body in standard ops.

The body is the op's definition: a target that has a kernel claims the op, every other target gets
the body inlined, tests compare against it. Bodies have no data-dependent shapes.

    >>> node.op_type, node.domain
    ('MixtureOfExperts', 'hal')
    >>> ensure_functions(model)        # model.functions now defines every hal op that it uses
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import onnx.parser
import onnx_ir as ir

from hal.errors import GraphError, did_you_mean
from hal.ir import cache_ops, quant_ops
from hal.ir.graph import HAL_DOMAIN, OPSET

HAL_OPSET = 1
"""Version of the ``hal`` operator set."""

_ACTIVATIONS = {
    "silu": "half = Sigmoid (gate)  active = Mul (gate, half)",
    "gelu": 'active = Gelu <approximate = "none"> (gate)',
    "gelu_tanh": 'active = Gelu <approximate = "tanh"> (gate)',
    "relu": "active = Relu (gate)",
}
ACTIVATIONS = tuple(_ACTIVATIONS)
"""Values that the ``activation`` attribute may take; ``gelu`` is the exact one."""

# Every expert computes every token; tokens that did not choose an expert weigh zero there.
_MIXTURE_OF_EXPERTS = """
<domain: "hal", opset_import: ["" : {opset}]>
MixtureOfExperts <activation> (x, expert_index, expert_weight, gate_up, down) => (y)
{{
    axis0 = Constant <value_ints = [0]> ()
    axis1 = Constant <value_ints = [1]> ()
    axis2 = Constant <value_ints = [2]> ()
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    zero_f = Constant <value_float = 0.0> ()
    x3 = Unsqueeze (x, axis0)
    gate_up_t = Transpose <perm = [0, 2, 1]> (gate_up)
    hidden = MatMul (x3, gate_up_t)
    gate, up = Split <axis = 2, num_outputs = 2> (hidden)
    {activation}
    gated = Mul (active, up)
    down_t = Transpose <perm = [0, 2, 1]> (down)
    per_expert = MatMul (gated, down_t)
    experts = Shape <start = 0, end = 1> (gate_up)
    experts_0d = Squeeze (experts, axis0)
    ids = Range (zero, experts_0d, one)
    index3 = Unsqueeze (expert_index, axis2)
    chosen = Equal (index3, ids)
    weight3 = Unsqueeze (expert_weight, axis2)
    zero_w = CastLike (zero_f, expert_weight)
    spread = Where (chosen, weight3, zero_w)
    combine = ReduceSum <keepdims = 0> (spread, axis1)
    combine_x = CastLike (combine, x)
    combine_t = Transpose <perm = [1, 0]> (combine_x)
    combine3 = Unsqueeze (combine_t, axis2)
    weighted = Mul (per_expert, combine3)
    y = ReduceSum <keepdims = 0> (weighted, axis0)
}}
"""

# Row r belongs to the expert whose number is how many groups have ended at or before r.
_GROUPED_MATMUL = """
<domain: "hal", opset_import: ["" : {opset}]>
GroupedMatMul (x, w, offsets) => (y)
{{
    axis0 = Constant <value_ints = [0]> ()
    axis1 = Constant <value_ints = [1]> ()
    axis2 = Constant <value_ints = [2]> ()
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    zero_f = Constant <value_float = 0.0> ()
    tokens = Shape <start = 0, end = 1> (x)
    tokens_0d = Squeeze (tokens, axis0)
    rows = Range (zero, tokens_0d, one)
    rows2 = Unsqueeze (rows, axis1)
    ends = Cast <to = 7> (offsets)
    ended = LessOrEqual (ends, rows2)
    ended_i = Cast <to = 7> (ended)
    expert = ReduceSum <keepdims = 0> (ended_i, axis1)
    experts = Shape <start = 0, end = 1> (w)
    experts_0d = Squeeze (experts, axis0)
    ids = Range (zero, experts_0d, one)
    ids2 = Unsqueeze (ids, axis1)
    mine = Equal (ids2, expert)
    mine3 = Unsqueeze (mine, axis2)
    x3 = Unsqueeze (x, axis0)
    per_expert = MatMul (x3, w)
    zero_x = CastLike (zero_f, x)
    masked = Where (mine3, per_expert, zero_x)
    y = ReduceSum <keepdims = 0> (masked, axis0)
}}
"""


@dataclasses.dataclass(frozen=True)
class HalOp:
    """One op of the domain: its documentation, attributes with defaults, and body as text."""

    name: str
    doc: str
    attributes: dict[str, str]
    body: Callable[[dict[str, str]], str]


def _mixture_of_experts(attributes: dict[str, str]) -> str:
    name = attributes["activation"]
    if name not in _ACTIVATIONS:
        raise GraphError(
            f"hal::MixtureOfExperts has the unknown activation {name!r}",
            did_you_mean(name, _ACTIVATIONS),
        )
    return _MIXTURE_OF_EXPERTS.format(opset=OPSET, activation=_ACTIVATIONS[name])


HAL_FUNCTIONS: dict[str, HalOp] = {
    op.name: op
    for op in (
        HalOp(
            "MixtureOfExperts",
            "y[t] = sum over k of expert_weight[t,k] * E(expert_index[t,k])(x[t]), with"
            " E(e)(x) = down[e] @ (act(gate[e] @ x) * (up[e] @ x)). Inputs: x [T,H], expert_index"
            " int64 [T,K] (an index outside 0..E-1 contributes nothing), expert_weight [T,K],"
            " gate_up [E,2I,H] (gate rows first), down [E,H,I]. Output y [T,H].",
            {"activation": "silu"},
            _mixture_of_experts,
        ),
        HalOp(
            "GroupedMatMul",
            "y[r] = x[r] @ w[e], where e is the expert whose group holds row r. Inputs: x [T,K]"
            " sorted by expert, w [E,K,N], offsets int32 [E] (end row of each group). Output"
            " y [T,N]; rows after the last group are zero.",
            {},
            lambda attributes: _GROUPED_MATMUL.format(opset=OPSET),
        ),
        HalOp(
            cache_ops.CACHE_WRITE,
            cache_ops.WRITE_DOC,
            cache_ops.WRITE_DEFAULTS,
            cache_ops.write_body,
        ),
        HalOp(
            cache_ops.CACHED_ATTENTION,
            cache_ops.ATTENTION_DOC,
            cache_ops.ATTENTION_DEFAULTS,
            cache_ops.attention_body,
        ),
        HalOp(
            quant_ops.ROUND_ACTIVATIONS,
            quant_ops.ROUND_DOC,
            quant_ops.ROUND_DEFAULTS,
            quant_ops.round_body,
        ),
        HalOp(
            quant_ops.UNPACK_BITS,
            quant_ops.UNPACK_DOC,
            quant_ops.UNPACK_DEFAULTS,
            quant_ops.unpack_body,
        ),
    )
}
"""The ops of the domain by name."""


def function(op_type: str, **attributes: str) -> ir.Function:
    """Build the body of a hal op for given attribute values (defaults fill the rest).

    Raises:
        GraphError: no such op, attribute or attribute value.
    """
    op = HAL_FUNCTIONS.get(op_type)
    if op is None:
        raise GraphError(f"unknown op hal::{op_type}", did_you_mean(op_type, HAL_FUNCTIONS))
    unknown = sorted(set(attributes) - set(op.attributes))
    if unknown:
        raise GraphError(
            f"hal::{op_type} has no attribute {unknown[0]!r}",
            did_you_mean(unknown[0], op.attributes),
        )
    proto = onnx.parser.parse_function(op.body({**op.attributes, **attributes}))
    proto.doc_string = op.doc
    return ir.serde.deserialize_function(proto)


def ensure_functions(model: ir.Model) -> None:
    """Attach the bodies of the hal ops that ``model`` uses, and the domain's opset import.

    Ops of one type with different attribute values need different bodies: the first values seen
    keep the plain name, others are told apart by the node's and function's ``overload``.

    Raises:
        GraphError: a node of the hal domain is of an unknown op or has a bad attribute.
    """
    seen: dict[tuple[str, tuple[tuple[str, str], ...]], str] = {}
    for node in _hal_nodes(model):
        op = HAL_FUNCTIONS.get(node.op_type)
        attributes = dict(op.attributes) if op else {}
        attributes.update((a.name, str(a.value)) for a in node.attributes.values())
        key = (node.op_type, tuple(sorted(attributes.items())))
        if key not in seen:
            first = not any(op_type == node.op_type for op_type, _ in seen)
            seen[key] = "" if first else "_".join(attributes.values())
            body = function(node.op_type, **attributes)
            body.overload = seen[key]
            model.functions[body.identifier()] = body
        node.overload = seen[key]
    if seen:
        model.graph.opset_imports[HAL_DOMAIN] = HAL_OPSET


def _hal_nodes(model: ir.Model) -> Iterator[ir.Node]:
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        yield from (n for n in list(graph.all_nodes()) if n.domain == HAL_DOMAIN)
