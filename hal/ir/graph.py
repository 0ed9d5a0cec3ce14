"""The graph that every frontend produces, every pass rewrites and every target consumes.

A :class:`Graph` is an ``onnx_ir.Model`` at opset :data:`OPSET`, plus what ONNX has no place for:
which inputs are *carried state* and what the model is for. Both are kept in the model's
``metadata_props`` when it is serialized, so ``graph.onnx`` in a bundle describes itself.

    >>> graph.signature().inputs
    (TensorSpec(name='input_ids', dtype='int64', dims=('batch', 'sequence')),)
    >>> graph.state[0].kind, graph.state[0].growth_axis
    ('key', 2)
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir

from hal.errors import GraphError
from hal.ir.signature import Dim, Signature, State, TensorSpec

OPSET = 28
"""Version of the default ONNX operator set that neutral graphs use."""

IR_VERSION = 13
"""ONNX file format version that neutral graphs are written with."""

HAL_DOMAIN = "hal"
"""Operator domain of ops that ONNX lacks; each carries a function body (:mod:`hal.ir.ops`)."""

_STATE_KEY = "hal.state"
_METADATA_KEY = "hal.metadata"


@dataclasses.dataclass
class Graph:
    """A model in the IR. Passes work on a :meth:`clone`; weights are shared, never copied.

    ``metadata`` holds neutral facts about the model that a runtime needs (``task``:
    ``causal-lm``, ``encoder``, ``image-classifier`` or ``generic``; ``eos_token_ids``; …);
    values must be JSON.
    """

    model: ir.Model
    state: tuple[State, ...] = ()
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def graph(self) -> ir.Graph:
        """The top-level ``onnx_ir.Graph``."""
        return self.model.graph

    @property
    def name(self) -> str:
        """The graph's name."""
        return self.graph.name or "model"

    def nodes(self) -> Iterator[ir.Node]:
        """All nodes in order, those of subgraphs (If, Loop, Scan) included."""
        return self.graph.all_nodes()

    def node_count(self) -> int:
        """Number of nodes, subgraphs included, constants excluded."""
        return sum(1 for node in self.nodes() if node.op_type != "Constant")

    def weight_bytes(self) -> int:
        """Total bytes of initializers, each counted once."""
        return sum(v.const_value.nbytes for v in self.graph.initializers.values() if v.const_value)

    def signature(self) -> Signature:
        """Inputs and outputs as a caller sees them, and the carried state."""
        carried_in = {s.input for s in self.state}
        carried_out = {s.output for s in self.state}
        return Signature(
            tuple(tensor_spec(v) for v in self.graph.inputs if v.name not in carried_in),
            tuple(tensor_spec(v) for v in self.graph.outputs if v.name not in carried_out),
            self.state,
        )

    def input_specs(self) -> dict[str, TensorSpec]:
        """Specs of all graph inputs by name, state included."""
        return {v.name or "": tensor_spec(v) for v in self.graph.inputs}

    def output_specs(self) -> dict[str, TensorSpec]:
        """Specs of all graph outputs by name, state included."""
        return {v.name or "": tensor_spec(v) for v in self.graph.outputs}

    def clone(self) -> Graph:
        """Copy the structure; tensors are shared."""
        return Graph(self.model.clone(), self.state, dict(self.metadata))

    def stamp(self) -> ir.Model:
        """Write state and metadata into the model's ``metadata_props`` and return the model."""
        self.model.metadata_props[_STATE_KEY] = json.dumps([s.to_json() for s in self.state])
        self.model.metadata_props[_METADATA_KEY] = json.dumps(self.metadata)
        return self.model

    @classmethod
    def from_model(cls, model: ir.Model) -> Graph:
        """Wrap a model, reading back what :meth:`stamp` wrote.

        Raises:
            GraphError: the stored state names values that the graph does not have.
        """
        state = tuple(
            State.from_json(s) for s in json.loads(model.metadata_props.get(_STATE_KEY, "[]"))
        )
        names_in = {v.name for v in model.graph.inputs}
        names_out = {v.name for v in model.graph.outputs}
        for item in state:
            if item.input not in names_in or item.output not in names_out:
                raise GraphError(
                    f"state {item.name!r} names values that the graph lacks",
                    "the graph was edited without its hal.state metadata",
                )
        return cls(model, state, json.loads(model.metadata_props.get(_METADATA_KEY, "{}")))


def tensor_spec(value: ir.Value) -> TensorSpec:
    """Describe one value of an ``onnx_ir`` graph."""
    kind, container = value.type, "tensor"
    while isinstance(kind, (ir.SequenceType, ir.OptionalType)):
        container = "sequence" if isinstance(kind, ir.SequenceType) else "optional"
        kind = kind.elem_type
    dtype = dtype_name(kind.dtype) if kind is not None else "unknown"
    dims: tuple[Dim, ...] | None = None
    if value.shape is not None:
        dims = tuple(
            d if isinstance(d, int) else (str(d.value) if d.value is not None else "?")
            for d in value.shape
        )
    return TensorSpec(value.name or "", dtype, dims, container)


def dtype_name(dtype: ir.DataType) -> str:
    """Name of an ONNX dtype as numpy and ml_dtypes spell it (``bfloat16``, ``int4``)."""
    if dtype is ir.DataType.STRING:
        return "string"
    if dtype is ir.DataType.UNDEFINED:
        return "unknown"
    return dtype.numpy().name


def dtype_from_name(name: str) -> ir.DataType:
    """Inverse of :func:`dtype_name`.

    Raises:
        GraphError: no ONNX dtype has this name.
    """
    for dtype in ir.DataType:
        if dtype_name(dtype) == name:
            return dtype
    raise GraphError(f"unknown dtype {name!r}", "use a numpy name such as float32 or int64")
