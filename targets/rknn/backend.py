"""Programs of Rockchip's NPUs: built with the bundle, run here by the toolkit's simulator.

The toolkit narrows a float model to float16 and takes an int8 model with its own scales
(``QuantizeLinear`` and ``DequantizeLinear``). Its simulator reads no finished program: a bundle
holds the program for the board and the model that it was built from, and the simulator builds the
model again when it is loaded.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import onnx
import onnx_ir as ir

from hal.descriptor import Descriptor
from hal.errors import TargetError, UnsupportedError
from hal.ir import Graph
from hal.targets.angles import coarse_angles
from hal.targets.backend import (
    BuildContext,
    Executable,
    LoadContext,
    Probe,
    Verdict,
    require_static,
)
from hal.targets.onnxruntime.weights import externalize, relocate
from hal.targets.own_environment import InOwnEnvironment, RouteOptions
from hal.targets.provider.models import IR_VERSION, as_bytes, name_nodes, stand_alone
from hal.targets.provider.worker import Remote, Worker
from hal.targets.rknn.options import RknnOptions
from hal.targets.rknn.plain import plain
from hal.targets.rknn.survey import Answer, numbered, on_processor, survey

SCRIPT = Path(__file__).with_name("serve.py")
PROGRAM, MODEL = "program.rknn", "model.onnx"


class RknnBackend(InOwnEnvironment):
    """The toolkit in a worker process."""

    name: ClassVar[str] = RknnOptions.backend
    options: ClassVar[type[RouteOptions]] = RknnOptions

    def __init__(self) -> None:
        self._reasons: weakref.WeakKeyDictionary[ir.Graph, dict[ir.Node, str]] = (
            weakref.WeakKeyDictionary()
        )

    def probe(self) -> Probe:
        """A simulator: which environments there are depends on the route."""
        return Probe("simulator", "rknn-toolkit2 runs in an environment of its own", {})

    def static_shapes(self, descriptor: Descriptor) -> bool:
        """They are."""
        return True

    def legalize(self, graph: Graph, descriptor: Descriptor) -> Graph:
        """What the toolkit can read, and its choice among it.

        Raises:
            UnsupportedError: the model has dynamic dims, or needs a newer operator set.
            TargetError: the environment is not made, or the toolkit fails.
        """
        require_static(graph, descriptor)
        options = RknnOptions.of(descriptor)
        options.environment.require(descriptor.name)
        legal = plain(graph, options.opset)
        name_nodes(legal.model)
        with _Asked(descriptor, options) as asked:
            known = coarse_angles(legal.graph, descriptor)
            self._reasons[legal.graph] = survey(legal, asked.build, known)
        return legal

    def supports(self, node: ir.Node, descriptor: Descriptor) -> Verdict:
        """What the toolkit put on the chip when it was asked."""
        graph = node.graph
        reasons = self._reasons.get(graph) if isinstance(graph, ir.Graph) else None
        if reasons is None:
            return Verdict.no("the graph was not shown to the toolkit")
        return Verdict.no(reasons[node]) if node in reasons else Verdict.yes()

    def build(self, graph: Graph, context: BuildContext) -> dict[str, Any]:
        """Write the segment's program, and its model for the simulator.

        Raises:
            UnsupportedError: the toolkit refuses it.
            TargetError: the environment is not made, or the toolkit fails.
        """
        options = RknnOptions.of(context.descriptor)
        names = [v.name for v in graph.graph.outputs]
        graph = numbered(graph.clone())
        externalize(graph, context.folder, context.bundle)
        graph.model.ir_version = IR_VERSION
        data = ir.to_proto(graph.model).SerializeToString()
        output = context.folder / PROGRAM
        with _worker(context.descriptor, options) as worker:
            head = {"do": "build", "weights": str(context.bundle), "output": str(output)}
            told, _ = worker.ask(head, {"model": as_bytes(data)}, limit=options.seconds)
        if "refused" in told:
            raise UnsupportedError(
                f"rknn-toolkit2 refuses a part of the model: {told['refused']}",
                "choose another target",
            )
        (context.folder / MODEL).write_bytes(data)
        return {
            "program": PROGRAM,
            "model": MODEL,
            "nodes": graph.node_count(),
            "layers": len(told["layers"]),
            "layer_dtypes": dict(Counter(dtype.lower() for _, dtype, _, _ in told["layers"])),
            "layers_on_processor": dict(Counter(on_processor(told["layers"]))),
            "inputs": {v.name: v.dtype.name if v.dtype else "" for v in graph.graph.inputs},
            "outputs": names,
            "shapes": [list(v.shape.numpy()) if v.shape else [] for v in graph.graph.outputs],
        }

    def load(self, record: Mapping[str, Any], context: LoadContext) -> Executable:
        """Start a simulator that holds the segment.

        Raises:
            TargetError: the environment is not made, or the toolkit fails.
        """
        options = RknnOptions.of(context.descriptor)
        data = bytes(context.files.mapped(f"{context.folder}/{record['model']}"))
        proto = onnx.ModelProto.FromString(data)
        weights = relocate(proto, context.files)
        worker = _start(context.descriptor, options)
        try:
            head = {"do": "load", "weights": str(weights), "shapes": record["shapes"]}
            model = as_bytes(proto.SerializeToString())
            worker.ask(head, {"model": model}, limit=options.seconds)
        except TargetError:
            worker.close()
            raise
        return Remote(worker, record, options.seconds)


class _Asked:
    """A worker that says what it makes of graphs, and is started again where one kills it."""

    def __init__(self, descriptor: Descriptor, options: RknnOptions) -> None:
        self._descriptor, self._options = descriptor, options
        self._worker = _start(descriptor, options)

    def build(self, graph: Graph) -> Answer:
        """Layers of the graph's program, or why there is none."""
        model, weights = stand_alone(graph)
        try:
            told, _ = self._worker.ask(
                {"do": "build", "weights": weights}, {"model": model}, limit=self._options.seconds
            )
        except TargetError as error:
            if self._worker.running:  # it is not the graph that is wrong
                raise
            self._worker.close()
            self._worker = _start(self._descriptor, self._options)
            return Answer(refused=error.message)
        return Answer(told.get("layers", ()), told.get("refused", ""))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.close()


@contextmanager
def _worker(descriptor: Descriptor, options: RknnOptions) -> Iterator[Worker]:
    worker = _start(descriptor, options)
    try:
        yield worker
    finally:
        worker.close()


def _start(descriptor: Descriptor, options: RknnOptions) -> Worker:
    place = options.environment.require(descriptor.name)
    worker = Worker(place.python, descriptor.name, script=SCRIPT)
    try:
        worker.ask({"do": "open", "platform": options.platform}, limit=options.seconds)
    except TargetError:
        worker.close()
        raise
    return worker
