"""NVIDIA GPUs through TVM, built ahead of time on a machine that need not have one.

The neutral graph is lowered as for processors, but nothing in it is shaped for vectors: TVM's
default rules for GPUs schedule every kernel. A bundle has code for the host and, beside it, the
kernels as a cubin (or PTX); where they run, TVM's runtime and a driver are enough.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar

import onnx_ir as ir

import hal.errors
from hal.descriptor import Descriptor, Route
from hal.errors import HalError, TargetError
from hal.ir import Graph
from hal.targets.backend import BuildContext, LoadContext, Probe
from hal.targets.cuda.device import missing_device, open_kernels
from hal.targets.cuda.options import CudaOptions
from hal.targets.onnxruntime.weights import externalize
from hal.targets.own_environment import InOwnEnvironment, RouteOptions
from hal.targets.process import Supervised
from hal.targets.tvm.backend import TvmBackend

if TYPE_CHECKING:
    from hal.targets.tvm.lower import Lowered
    from hal.targets.tvm.lowering import Shaping


class CudaBackend(InOwnEnvironment, TvmBackend):
    """Compiles segments to host code and kernels in a worker process."""

    name: ClassVar[str] = CudaOptions.backend
    options: ClassVar[type[RouteOptions]] = CudaOptions

    def probe(self) -> Probe:
        """Whether there is a GPU; without one, TVM is enough to build."""
        found = TvmBackend.probe(self)
        if found.status != "present" or not (missing := missing_device()):
            return found
        return Probe("builds", f"{missing}: what is built is not run", found.versions)

    def check_route(self, route: Route) -> str:
        """What the table of the route lacks."""
        return InOwnEnvironment.check_route(self, route)

    def cannot_run(self, descriptor: Descriptor) -> str:
        """No driver, no GPU, or one of another architecture; emulated kernels run anywhere."""
        options = CudaOptions.of(descriptor)
        return "" if options.emulated else missing_device(options.target["arch"], options.binary)

    def shaping(self, descriptor: Descriptor) -> Shaping:
        """Plain: nothing is shaped before the rules for GPUs see it."""
        from hal.targets.tvm.lowering import Shaping

        return Shaping(plain=True)

    def build(self, graph: Graph, context: BuildContext) -> dict[str, Any]:
        """As TVM's; all large weights are in files, so that another process can read the graph."""
        graph = graph.clone()
        externalize(graph, context.folder, context.bundle)
        record = super().build(graph, context)
        return {**record, "notes": [*record["notes"], kernels_text(record)]}

    def write_library(
        self, graph: Graph, lowered: Lowered, context: BuildContext
    ) -> dict[str, Any]:
        """Write host code and kernels, made in a process with a time limit.

        Raises:
            UnsupportedError: a kernel cannot be made, or needs more than the chip has.
            TargetError: the environment is not made, a tool fails, or the process dies.
        """
        from hal.targets.cuda.worker import ANSWER, GRAPH, REQUEST

        options, name = CudaOptions.of(context.descriptor), context.descriptor.name
        place = options.require(context.descriptor)
        with tempfile.TemporaryDirectory(prefix="hal-") as scratch:
            folder = Path(scratch)
            request = {
                "target": options.target,
                "binary": options.binary,
                "emulated": options.emulated,
                "link": [w.replace("{python}", str(place.python)) for w in options.link],
                "toolkit": str(toolkit(options)),
                "output": str(context.folder),
                "weights": str(context.bundle),
            }
            (folder / REQUEST).write_text(json.dumps(request))
            (folder / GRAPH).write_bytes(ir.to_proto(graph.stamp()).SerializeToString())

            def answered(_stdin: IO[bytes], stdout: IO[bytes]) -> dict[str, Any] | None:
                stdout.read()  # until the process ends
                answer = folder / ANSWER
                return dict(json.loads(answer.read_text())) if answer.exists() else None

            command = [sys.executable, "-m", "hal.targets.cuda.worker", str(folder)]
            with Supervised(command, name) as worker:
                answer = worker.exchange("compile", options.seconds, answered)
        if "error" in answer:
            kind: type[HalError] = getattr(hal.errors, answer["error"])
            raise kind(answer["message"], answer["hint"])
        if answer.pop("weights") != [v.name for v in lowered.weights]:
            raise TargetError("the worker lowered another program than this process", "report this")
        return {"arch": options.target["arch"], "emulated": options.emulated, **answer}

    def open_library(
        self, record: Mapping[str, Any], context: LoadContext
    ) -> tuple[Any, Any, bool]:
        """Host code with the kernels beside it, and the GPU (emulated: the processor, used alike).

        Raises:
            TargetError: there is no such GPU here.
        """
        import tvm

        from hal.targets.tvm.runtime import load_library

        options = CudaOptions.of(context.descriptor)
        if why := self.cannot_run(context.descriptor):
            raise TargetError(
                f"the build for {context.descriptor.name!r} cannot run here: {why}",
                "run the bundle where the GPU is, or retarget it: --target host",
            )
        library, device, _ = TvmBackend.open_library(self, record, context)
        path = Path(context.files.extracted(f"{context.folder}/{record['kernels']}"))
        if record["emulated"]:
            kernels = load_library(path)
        else:
            device = tvm.cuda(0)
            kernels = open_kernels(path, options.binary, record["functions"], toolkit(options))
        for part in library.imports:
            part.import_module(kernels)
        return library, device, True


def kernels_text(record: Mapping[str, Any]) -> str:
    """A sentence about the kernels of a build, with the most that one of them needs of a GPU."""
    known = list(record["functions"].values())

    def most(what: str) -> str:
        return f"{max((kernel[what] for kernel in known), default=0):,}"

    text = f"{len(known)} kernels for {record['arch']} in {record['kernels']}"
    if record["emulated"]:
        return f"{text}, run by the processor: emulated"
    return (
        f"{text}: at most {most('threads')} threads and {most('shared')} bytes of shared memory in "
        f"a block, {most('registers')} registers in a thread"
    )


def toolkit(options: CudaOptions) -> Path:
    """Where the environment's packages put NVIDIA's tools, headers and libraries."""
    packages = options.environment.folder / "venv" / "lib"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    found = sorted((packages / version / "site-packages" / "nvidia").glob("cu[0-9]*"))
    return found[-1] if found else packages


__all__ = ["CudaBackend", "toolkit"]
