"""The backend's six calls; everything that needs TVM is imported when it is first used."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hal.descriptor import Descriptor, Route, TvmRoute
from hal.errors import (
    HalError,
    InputError,
    MissingExtraError,
    TargetError,
    UnsupportedError,
    did_you_mean,
)
from hal.ir.cache_plan import in_place
from hal.targets.backend import Backend, BuildContext, Executable, LoadContext, Probe, Verdict
from hal.targets.detect import usable_cores
from hal.targets.tvm.target import tvm_route, tvm_target

if TYPE_CHECKING:
    import onnx_ir as ir

    from hal.ir import Graph
    from hal.targets.reading import WeightReads
    from hal.targets.tvm.lower import Lowered
    from hal.targets.tvm.lowering import Shaping
    from hal.targets.tvm.program import Program

LIBRARY = "lib.so"

# TVM's pool pins the calling thread to one core, and with it whatever runs in this process later:
# another runtime's threads inherit it. Measured: half the speed of the other route on two cores.
os.environ.setdefault("TVM_BIND_THREADS", "0")


class TvmBackend(Backend):
    """Compiles segments to a shared library by Relax, TIR and LLVM."""

    name: ClassVar[str] = "tvm"

    def __init__(self) -> None:
        self._refused: weakref.WeakKeyDictionary[ir.Graph, dict[ir.Node, str]] = (
            weakref.WeakKeyDictionary()
        )

    def probe(self) -> Probe:
        """Say whether TVM is installed (it is not imported: that takes seconds)."""
        if importlib.util.find_spec("tvm") is None:
            return Probe("absent", "the package apache-tvm is not installed")
        try:
            version = importlib.metadata.version("apache-tvm")
        except importlib.metadata.PackageNotFoundError:
            version = "unknown"
        return Probe("present", versions={"apache-tvm": version})

    def check_route(self, route: Route) -> str:
        """TVM must know the target's kind and options; without TVM nobody can say."""
        if not isinstance(route, TvmRoute) or importlib.util.find_spec("tvm") is None:
            return ""
        import tvm

        kind, known = route.target["kind"], [str(k) for k in tvm.target.Target.list_kinds()]
        if kind not in known:
            return f"TVM knows no target kind {kind!r}; {did_you_mean(kind, known)}"
        try:
            tvm.target.Target(dict(route.target))
        except Exception as error:  # noqa: BLE001  TVM raises its own kinds
            line = (str(error).strip().splitlines() or [repr(error)])[-1]
            return f"TVM does not take the target: {line[:200]}"
        return ""

    def legalize(self, graph: Graph, descriptor: Descriptor) -> Graph:
        """Inline the bodies of ops that have no kernel here."""
        _require_tvm()
        from hal.targets.tvm.legalize import legalize

        return legalize(graph, self.shaping(descriptor))

    def shaping(self, descriptor: Descriptor) -> Shaping:
        """What kernels for a chip are shaped by."""
        return shaping_of(descriptor)

    def weights_read(self, graph: Graph) -> WeightReads:
        """Counted on the weights as the kernels have them packed."""
        from hal.targets.tvm.notes import weights_read

        return weights_read(graph.graph)

    def supports(self, node: ir.Node, descriptor: Descriptor) -> Verdict:
        """Claim a node if a dry run of the lowering converts it in its graph."""
        _require_tvm()
        import onnx_ir as ir

        from hal.targets.tvm.lower import check

        graph = node.graph
        if not isinstance(graph, ir.Graph):
            return Verdict.no("the node is in a function body")
        if graph not in self._refused:
            self._refused[graph] = check(graph, self.shaping(descriptor))
        reason = self._refused[graph].get(node)
        return Verdict.yes() if reason is None else Verdict.no(reason)

    def build(self, graph: Graph, context: BuildContext) -> dict[str, Any]:
        """Write ``lib.so`` and the record of inputs, outputs and weights.

        Raises:
            UnsupportedError: a node cannot be lowered or compiled.
        """
        _require_tvm()
        from hal.targets.tvm.lower import lower
        from hal.targets.tvm.notes import weights_read
        from hal.targets.tvm.weights import record_weights

        lowered = lower(graph, self.shaping(context.descriptor))
        facts = self.write_library(graph, lowered, context)
        reads = weights_read(graph.graph)
        weights = record_weights(lowered.weights, context.folder)
        return {
            "library": LIBRARY,
            "inputs": [[p.name, p.dtype] for p in lowered.inputs],
            "outputs": [[p.name, p.dtype] for p in lowered.outputs],
            "in_place": in_place(graph),
            "single": [list(place) for place in lowered.single],
            "weights": [dataclasses.asdict(w) for w in weights],
            "notes": reads.notes,
            "bytes_read": reads.bytes,
            "tvm": importlib.metadata.version("apache-tvm"),
            **facts,
        }

    def write_library(
        self, graph: Graph, lowered: Lowered, context: BuildContext
    ) -> dict[str, Any]:
        """Compile a segment, which is ``lowered``, to ``lib.so``; what else its record is to say.

        Raises:
            UnsupportedError: it cannot be compiled.
        """
        from hal.targets.tvm.compilation import compile_module, export

        route, target = tvm_route(context.descriptor), tvm_target(context.descriptor)
        lanes = self.shaping(context.descriptor).lanes
        library = compile_module(lowered.module, target, lanes)
        export(library, context.folder / LIBRARY, route.cross_compiler)
        return {}

    def open_library(
        self, record: Mapping[str, Any], context: LoadContext
    ) -> tuple[Any, Any, bool]:
        """A segment's library, the device that it runs on, and whether that has its own memory."""
        from hal.targets.tvm.runtime import cpu, load_library

        path = context.files.extracted(f"{context.folder}/{record['library']}")
        return load_library(Path(path)), cpu(), False

    def load(self, record: Mapping[str, Any], context: LoadContext) -> Executable:
        """Load the library and map the weights.

        Raises:
            TargetError: the library was made for another machine or another TVM.
        """
        _require_tvm()
        from hal.targets.tvm.program import Port, Program, use_threads
        from hal.targets.tvm.weights import Weight, load_weights

        use_threads(context.threads)
        weights = [Weight.from_json(w) for w in record["weights"]]
        tensors, alive = load_weights(weights, context.files, context.folder)
        inputs, outputs = (
            [Port(name, dtype) for name, dtype in record[side]] for side in ("inputs", "outputs")
        )
        try:
            library, device, own_memory = self.open_library(record, context)
            program = Program(
                library,
                inputs,
                outputs,
                tensors,
                alive,
                in_place=record.get("in_place"),
                single=[(name, axis) for name, axis in record.get("single", [])],
                device=device,
                own_memory=own_memory,
            )
        except HalError:
            raise
        except Exception as error:  # TVM raises its own kinds
            text = (str(error).strip().splitlines() or [repr(error)])[-1]
            raise TargetError(
                f"the build {context.folder!r} cannot be loaded here: {text}",
                f"retarget the bundle on this machine; it was built with TVM {record.get('tvm')}",
            ) from error
        return TvmExecutable(program)


class TvmExecutable(Executable):
    """A loaded segment."""

    def __init__(self, program: Program) -> None:
        self._program: Program | None = program

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Run once on NumPy arrays.

        Raises:
            InputError: an input is missing, or its shape does not fit.
        """
        if self._program is None:
            raise TargetError("the segment was closed", "load the bundle again")
        missing = [p.name for p in self._program.inputs if p.name not in inputs]
        if missing:
            raise InputError(f"input {missing[0]!r} is missing", "pass every input by name")
        return self._program(inputs)

    def close(self) -> None:
        """Release the virtual machine and the weights."""
        self._program = None


def _require_tvm() -> None:
    if importlib.util.find_spec("tvm") is None:
        raise MissingExtraError("the backend tvm", "tvm")


def shaping_of(descriptor: Descriptor) -> Shaping:
    """Numbers of the chip that kernels are shaped by."""
    from hal.kernels.quantized_layout import byte_dot
    from hal.targets.tvm.lowering import Shaping

    lanes = descriptor.vector_lanes("float32")
    return Shaping(
        lanes=lanes if lanes > 1 else 4,
        cores=descriptor.cores or usable_cores(),
        registers=descriptor.vector.registers or Shaping.registers,
        dot=byte_dot(descriptor),
    )


__all__ = ["TvmBackend", "TvmExecutable", "UnsupportedError"]
