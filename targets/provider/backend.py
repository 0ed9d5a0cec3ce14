"""Execution providers of ONNX Runtime that vendors ship, each in a process of its own.

The neutral graph is legalized for the runtime of that environment, the provider is asked which
nodes it takes, and what it takes is compiled and run there. Nothing falls to that runtime's own
CPU kernels: what the provider does not take goes to hal's host runtime, and is counted as such.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import ml_dtypes  # noqa: F401 - registers the names of small dtypes with NumPy
import numpy as np
import onnx
import onnx_ir as ir

from hal.descriptor import Descriptor
from hal.errors import TargetError
from hal.ir import Graph
from hal.targets import partition
from hal.targets.angles import coarse_angles
from hal.targets.backend import (
    BuildContext,
    Executable,
    LoadContext,
    Probe,
    Verdict,
    require_static,
)
from hal.targets.onnxruntime.kernels import NEWEST, KernelTable, kernel_table
from hal.targets.onnxruntime.legalize import legalize
from hal.targets.onnxruntime.opset import OLDEST
from hal.targets.onnxruntime.weights import externalize, relocate
from hal.targets.own_environment import InOwnEnvironment, RouteOptions
from hal.targets.provider.models import IR_VERSION, as_bytes, name_nodes, stand_alone
from hal.targets.provider.options import ProviderOptions
from hal.targets.provider.worker import Remote, Worker
from hal.targets.simplify import simplify

_MODEL = "model.onnx"
_HOST = "host"


class ProviderBackend(InOwnEnvironment):
    """A provider in a worker process."""

    name: ClassVar[str] = ProviderOptions.backend
    options: ClassVar[type[RouteOptions]] = ProviderOptions

    def __init__(self) -> None:
        self._left: weakref.WeakKeyDictionary[ir.Graph, dict[str, str]] = (
            weakref.WeakKeyDictionary()
        )

    def probe(self) -> Probe:
        """Present: which environments there are depends on the route."""
        return Probe("present", "providers run in environments of their own", {})

    def legalize(self, graph: Graph, descriptor: Descriptor) -> Graph:
        """What the worker's runtime has kernels for, and the provider's choice among it.

        Raises:
            UnsupportedError: the chip wants static shapes and the model has dynamic dims.
            TargetError: the environment is not made, or its software fails.
        """
        if not descriptor.behaviour.dynamic_shapes:
            require_static(graph, descriptor)
        options = ProviderOptions.of(descriptor)
        with _started(descriptor, options) as (worker, table):
            legal = legalize(graph, table)
            # What can be computed now, or was computed already, needs neither a kernel nor a place.
            simplify(legal)
            name_nodes(legal.model)
            coarse = coarse_angles(legal.graph, descriptor)
            known = {str(node.name): reason for node, reason in coarse.items()}
            self._left[legal.graph] = _refusals(legal, worker, options, known)
        return legal

    def supports(self, node: ir.Node, descriptor: Descriptor) -> Verdict:
        """What the provider took when it was asked."""
        graph = node.graph
        left = self._left.get(graph) if isinstance(graph, ir.Graph) else None
        if left is None:
            return Verdict.no("the graph was not shown to the provider")
        reason = left.get(node.name or "")
        return Verdict.yes() if reason is None else Verdict.no(reason)

    def build(self, graph: Graph, context: BuildContext) -> dict[str, Any]:
        """Write the segment's model; with ``offline`` the provider's finished programs."""
        options = ProviderOptions.of(context.descriptor)
        graph = graph.clone()
        externalize(graph, context.folder, context.bundle)
        graph.model.ir_version = IR_VERSION
        data = ir.to_proto(graph.model).SerializeToString()
        output = context.folder / _MODEL
        record: dict[str, Any] = {
            "model": _MODEL,
            "nodes": graph.node_count(),
            "inputs": {v.name: _dtype(v) for v in graph.graph.inputs},
            "outputs": [v.name for v in graph.graph.outputs],
            "offline": options.offline,
        }
        if not options.offline:
            output.write_bytes(data)
            return record
        with _started(context.descriptor, options) as (worker, _):
            head = {"do": "compile", "weights": str(context.bundle), "output": str(output)}
            worker.ask(head, {"model": as_bytes(data)}, limit=options.seconds)
        return record

    def load(self, record: Mapping[str, Any], context: LoadContext) -> Executable:
        """Start a worker that holds the segment.

        Raises:
            TargetError: the environment is not made, or its software fails.
        """
        options = ProviderOptions.of(context.descriptor)
        data = bytes(context.files.mapped(f"{context.folder}/{record['model']}"))
        proto = onnx.ModelProto.FromString(data)
        weights = relocate(proto, context.files)
        worker = _start(context.descriptor, options)
        try:
            _open(worker, options)
            head = {"do": "load", "weights": str(weights), "threads": context.threads}
            model = data if record["offline"] else proto.SerializeToString()
            worker.ask(head, {"model": as_bytes(model)}, limit=options.seconds)
        except TargetError:
            worker.close()
            raise
        return Remote(worker, record, options.seconds)


def _refusals(
    legal: Graph,
    worker: Worker,
    options: ProviderOptions,
    known: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, str]:
    """Names of the nodes that are not the provider's, with the reasons; ``known`` are some.

    The provider is asked about what is left once the descriptor's own refusals are taken out, and
    again about the segments that its answers leave: alone, it may not take what it took in company.
    """
    refused = {**known} | {
        str(node.name): left.reason
        for node in legal.graph
        for left in reversed(options.leaves)
        if left.applies(node)
    }
    asked: set[tuple[str | None, ...]] = set()
    while True:
        fresh = False
        for part in _parts(legal, refused):
            names = tuple(n.name for n in part.graph)
            if names in asked:
                continue
            asked.add(names)
            proto, weights = stand_alone(part)
            told, _ = worker.ask(
                {"do": "assign", "weights": weights}, {"model": proto}, limit=options.seconds
            )
            found = judged(told, [str(name) for name in names], options.provider)
            refused |= found
            fresh |= bool(found)
        if not fresh:
            return refused


def _parts(legal: Graph, refused: Mapping[str, str]) -> list[Graph]:
    """The segments that are left for the provider without the refused nodes."""
    if not refused:
        return [legal]
    verdicts = {
        n: Verdict.no(refused[str(n.name)]) if n.name in refused else Verdict.yes()
        for n in legal.graph
    }
    plan = partition.plan(legal, ProviderBackend.name, verdicts, _HOST)
    return [
        partition.extract(legal, segment, f"part_{index}")
        for index, segment in enumerate(plan.segments)
        if segment.backend == ProviderBackend.name
    ]


def judged(told: Mapping[str, Any], names: Sequence[str], provider: str) -> dict[str, str]:
    """What a worker's answer about nodes of these names means: the refused ones, with reasons.

    Where the runtime itself adds nodes that the provider does not take (around one whose layout
    it changes), the nodes that it rewrote are refused: alone, the provider cannot run them.
    """
    if told["all"]:
        return dict.fromkeys(names, f"{provider} does not take it")
    refused = {n: f"{provider} does not take it" for n in told["nodes"] if n in names}
    known = set(names)
    if any(n not in known for n in told["nodes"]):
        reason = f"the runtime rewrites it with nodes that {provider} does not take"
        rewritten = [n for n in told.get("rewritten", ()) if n in known]
        refused |= {n: reason for n in rewritten if n not in refused}
    return refused


class _started:  # noqa: N801 - used as a function
    """A worker with its provider open, and the kernels of its runtime."""

    def __init__(self, descriptor: Descriptor, options: ProviderOptions) -> None:
        self._worker = _start(descriptor, options)
        self._options = options

    def __enter__(self) -> tuple[Worker, KernelTable]:
        try:
            _open(self._worker, self._options)
            return self._worker, _kernels(self._worker, self._options)
        except TargetError:
            self._worker.close()
            raise

    def __exit__(self, *_: object) -> None:
        self._worker.close()


def _start(descriptor: Descriptor, options: ProviderOptions) -> Worker:
    place = options.require(descriptor)
    files = str(place.files)
    variables = {k: v.replace("{files}", files) for k, v in options.variables.items()}
    return Worker(place.python, descriptor.name, variables)


def _open(worker: Worker, options: ProviderOptions) -> None:
    head = {
        "do": "open", "provider": options.provider, "library": options.library,
        "options": {k: _text(v) for k, v in options.options.items()},
        "entries": {k: _text(v) for k, v in options.session_options.items()},
    }  # fmt: skip
    worker.ask(head, limit=options.seconds)


def _kernels(worker: Worker, options: ProviderOptions) -> KernelTable:
    """The installed runtime's kernels, up to the operator set that the worker's one reads."""
    told, _ = worker.ask({"do": "reads"}, _probes(), limit=options.seconds)
    if not told["reads"]:
        raise TargetError(
            f"onnxruntime {told['version']} reads no operator set that hal writes",
            "pin a newer version of the packages in the descriptor",
        )
    newest = max(told["reads"])
    return kernel_table().until(min(newest, options.opset or newest))


@functools.cache
def _probes() -> dict[str, np.ndarray]:
    """The smallest model of each operator set that hal may write."""
    models = {}
    for opset in range(OLDEST, NEWEST + 1):
        value = ir.Value(name="x", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT))
        node = ir.Node("", "Identity", [value])
        node.outputs[0].name = "y"
        node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
        graph = ir.Graph([value], node.outputs, nodes=[node], opset_imports={"": opset}, name="g")
        model = ir.Model(graph, ir_version=IR_VERSION)
        models[str(opset)] = as_bytes(ir.to_proto(model).SerializeToString())
    return models


def _dtype(value: ir.Value) -> str:
    return value.dtype.name if value.dtype is not None else ""


def _text(value: object) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)
