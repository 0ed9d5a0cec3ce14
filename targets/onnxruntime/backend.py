"""The backend of ONNX Runtime: always there, runs on every machine, last resort of all others."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import onnx
import onnx_ir as ir
import onnxruntime as ort

from hal.descriptor import Descriptor, OnnxRuntimeRoute, Route
from hal.errors import UnsupportedError, did_you_mean
from hal.ir import HAL_DOMAIN, OPSET, Graph, subgraphs
from hal.ir.cache_plan import in_place
from hal.ir.ops import ensure_functions
from hal.targets.backend import Backend, BuildContext, Executable, LoadContext, Probe, Verdict
from hal.targets.onnxruntime.kernels import kernel_table
from hal.targets.onnxruntime.legalize import assess, legalize, uncovered
from hal.targets.onnxruntime.notes import cache_notes, weights_read
from hal.targets.onnxruntime.packing import Repacking, repacks_at_load, token_input
from hal.targets.onnxruntime.session import NO_REPACKING, OnnxRuntimeExecutable, open_session
from hal.targets.onnxruntime.static import expanded_bytes
from hal.targets.onnxruntime.weights import externalize, relocate, weight_files
from hal.targets.reading import WeightReads

_MODEL = "model.onnx"
_IR_VERSION = 13


class OnnxRuntimeBackend(Backend):
    """Kernels where the runtime has them, function bodies where it has not."""

    name: ClassVar[str] = "onnxruntime"

    def probe(self) -> Probe:
        """Present wherever the core is installed; lists the providers of the installed build."""
        providers = ", ".join(ort.get_available_providers())
        versions = {"onnxruntime": ort.__version__, "onnx": onnx.__version__}
        return Probe("present", f"providers: {providers}", versions)

    def check_route(self, route: Route) -> str:
        """A provider's name must be one that some build of the runtime knows, or a plug-in's."""
        if not isinstance(route, OnnxRuntimeRoute):
            return ""
        known = ort.get_all_providers()
        for name in route.providers:
            if not name.strip():
                return "a provider has an empty name"
            if name not in known and route.library is None and route.package is None:
                return (
                    f"onnxruntime knows no provider {name!r}, and no library or package has it;"
                    f" {did_you_mean(name, known)}"
                )
        lost = [name for name in route.provider_options if name not in route.providers]
        return f"provider_options are given for {lost[0]!r}, no provider" if lost else ""

    def legalize(self, graph: Graph, descriptor: Descriptor) -> Graph:
        """Choose the operator-set version, cast around missing dtypes, inline missing ops."""
        return legalize(graph)

    def weights_read(self, graph: Graph) -> WeightReads:
        """Counted on the kernels' own containers."""
        return weights_read(graph.model)

    def supports(self, node: ir.Node, descriptor: Descriptor) -> Verdict:
        """Claim what has a kernel, or a body all of whose nodes have one."""
        opsets = _opsets(node)
        for inner in _with_subgraphs(node):
            reason = _refusal(inner, opsets)
            if reason:
                return Verdict.no(reason)
        return Verdict.yes()

    def build(self, graph: Graph, context: BuildContext) -> dict[str, Any]:
        """Write ``model.onnx``; weights stay in the bundle, repacked ones go next to the model.

        Raises:
            UnsupportedError: a node has neither kernel nor body.
        """
        legal = legalize(graph)
        missing = list(uncovered(legal.model))
        if missing:
            node, reason = missing[0]
            raise UnsupportedError(
                f"{len(missing)} nodes have no kernel in onnxruntime, first {node.op_type} "
                f"(node {node.name!r}): {reason}",
                "choose another target, or replace the op in the model",
            )
        reads = weights_read(legal.model)
        prepack = repacks_at_load(legal)
        repacked = externalize(legal, context.folder, context.bundle)
        legal.model.ir_version = _IR_VERSION
        (context.folder / _MODEL).write_bytes(ir.to_proto(legal.model).SerializeToString())
        return {
            "model": _MODEL,
            "opset": legal.model.opset_imports[""],
            "nodes": legal.node_count(),
            "repacked_bytes": repacked,
            "prepack": prepack,
            "repack_for": "" if prepack else token_input(legal),
            "in_place": in_place(legal),
            "fold_bytes": expanded_bytes(legal.model),
            "notes": [*reads.notes, *cache_notes(graph, legal)],
            "bytes_read": reads.bytes,
        }

    def load(self, record: Mapping[str, Any], context: LoadContext) -> Executable:
        """Make a session whose weights are mapped from the bundle.

        Raises:
            TargetError: a provider that the route names is missing or cannot start, or the
                runtime refuses the model.
        """
        data = context.files.mapped(f"{context.folder}/{record['model']}")
        proto = onnx.ModelProto.FromString(bytes(data))
        folder = relocate(proto, context.files)
        route = _route(context.descriptor)
        model = proto.SerializeToString()
        open_with = functools.partial(
            open_session,
            model,
            route,
            weights=folder,
            threads=context.threads,
            fold_bytes=int(record.get("fold_bytes", 0)),
        )
        repacking, tokens = None, str(record.get("repack_for", ""))
        if tokens and NO_REPACKING not in route.session_options:
            files = weight_files(proto, folder)
            repacking = Repacking(tokens, functools.partial(open_with, prepack=True), files)
        session = open_with(prepack=bool(record.get("prepack", True)))
        return OnnxRuntimeExecutable(session, record.get("in_place"), repacking)


def _route(descriptor: Descriptor) -> OnnxRuntimeRoute:
    """The descriptor's own route; a chip without one gets plain CPU, where fallbacks run."""
    found = descriptor.route_through("onnxruntime")
    if found and isinstance(found[1], OnnxRuntimeRoute):
        return found[1]
    return OnnxRuntimeRoute(providers=("CPUExecutionProvider",))


def _with_subgraphs(node: ir.Node) -> Iterator[ir.Node]:
    yield node
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield from attribute.as_graph().all_nodes()
        elif attribute.type == ir.AttributeType.GRAPHS:
            for graph in attribute.as_graphs():
                yield from graph.all_nodes()


def _refusal(node: ir.Node, opsets: dict[str, int]) -> str:
    """Why a node cannot run, or nothing."""
    version = opsets.get("", OPSET)
    shell = ir.Model(ir.Graph((), (), nodes=(), opset_imports=opsets), ir_version=_IR_VERSION)
    found = assess(shell, node, version, version, kernel_table())
    if found.match is not None and not found.match.casts:
        return ""
    if not found.inline and found.match is None and node.domain != HAL_DOMAIN:
        return found.reason
    alone = legalize(_alone(node, opsets))
    return next((reason for _, reason in uncovered(alone.model)), "")


def _opsets(node: ir.Node) -> dict[str, int]:
    """Operator sets of the graph that a node is in; the neutral one for a node without."""
    return dict(node.graph.opset_imports) if node.graph is not None else {"": OPSET}


def _captured(node: ir.Node) -> Iterator[ir.Value]:
    """Values that the subgraphs of ``node`` read from outside of it."""
    inside = dict.fromkeys(g for inner in _with_subgraphs(node) for g in subgraphs(inner))
    for inner in _with_subgraphs(node):
        if inner is not node:
            yield from (v for v in inner.inputs if v is not None and v.graph not in inside)
    for graph in inside:
        yield from (v for v in graph.outputs if v.graph not in inside)


def _alone(node: ir.Node, opsets: dict[str, int]) -> Graph:
    """A graph of a copy of ``node`` and nothing else; what it reads are inputs of its types."""
    values = dict.fromkeys(v for v in node.inputs if v is not None)
    values |= dict.fromkeys(_captured(node))
    view = ir.GraphView(list(values), node.outputs, nodes=[node], opset_imports=opsets)
    body = view.clone()
    model = ir.Model(body, ir_version=_IR_VERSION)
    ensure_functions(model)
    return Graph(model)
