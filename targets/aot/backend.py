"""Programs without a runtime: kernels and a table of calls, linked ahead of time.

The same kernels as on the route through TVM, compiled to an object for the chip, and a small C
program that calls them in their order. It needs a C library and no runtime, no
Python and no operating system but files, so it runs where those cannot go: under an emulator of
another processor, in a WebAssembly engine, on small boards. Shapes are static. A cache of keys and
values stays in the program's memory from call to call.
"""

from __future__ import annotations

import dataclasses
import platform
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, ClassVar

import ml_dtypes  # noqa: F401 - registers the names of small dtypes with NumPy
import numpy as np
import onnx_ir as ir

from hal.descriptor import Descriptor
from hal.errors import InputError, TargetError
from hal.ir import Graph
from hal.targets.aot.options import AotOptions
from hal.targets.aot.page import require_arrays, write_page
from hal.targets.aot.pools import KeptPool, keep_pools
from hal.targets.backend import BuildContext, Executable, LoadContext, require_static
from hal.targets.environments import Environment
from hal.targets.own_environment import InOwnEnvironment, RouteOptions
from hal.targets.process import Supervised
from hal.targets.tvm.backend import TvmBackend, shaping_of
from hal.targets.tvm.storage import STORED_AS, from_storage, to_storage

HERE = Path(__file__).parent
PROGRAM, WEIGHTS = "program", "weights.bin"


class AotBackend(InOwnEnvironment, TvmBackend):
    """Links a program for each segment, and runs it in a process."""

    name: ClassVar[str] = AotOptions.backend
    options: ClassVar[type[RouteOptions]] = AotOptions

    def static_shapes(self, descriptor: Descriptor) -> bool:
        """They are, on any chip."""
        return True

    def legalize(self, graph: Graph, descriptor: Descriptor) -> Graph:
        """As TVM does; dynamic dims are refused here already.

        Raises:
            UnsupportedError: the graph has some, or a page cannot pass its inputs.
        """
        require_static(graph, descriptor)
        if AotOptions.of(descriptor).in_page:
            signature = [*graph.graph.inputs, *graph.graph.outputs]
            require_arrays((v.name or "", v.dtype) for v in signature)
        return super().legalize(graph, descriptor)

    def build(self, graph: Graph, context: BuildContext) -> dict[str, Any]:
        """Write the program and its weights.

        Raises:
            UnsupportedError: a node cannot be lowered, or needs a runtime.
            TargetError: the environment is not made, or its compiler fails.
        """
        from hal.targets.aot.plan import plan
        from hal.targets.aot.program import kernel_object, planned_module
        from hal.targets.aot.source import program_header
        from hal.targets.tvm.lower import lower
        from hal.targets.tvm.target import completed_target

        options = AotOptions.of(context.descriptor)
        place = options.require(context.descriptor)
        target = completed_target(context.descriptor, options.target)
        shaping = shaping_of(context.descriptor)
        kept: list[KeptPool] = []
        if not options.in_page:  # a page is called with all that it needs
            graph, kept = keep_pools(graph)
        lowered = lower(graph, shaping)
        module = planned_module(lowered.module, target, shaping.lanes)
        pools = {pool.input for pool in kept}
        places = [at for at, port in enumerate(lowered.inputs) if port.name in pools]
        planned = plan(module, [_array(v) for v in lowered.weights], places)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "program.h").write_text(program_header(planned))
            kernel_object(module, planned, target, folder / "kernels.o")
            command = [
                *_filled(options.compile, place), f"-I{folder}", str(HERE / "runtime.c"),
                str(folder / "kernels.o"), "-lm", "-o", str(context.folder / PROGRAM),
            ]  # fmt: skip
            _compile(command, context.descriptor.name)
        with (context.folder / WEIGHTS).open("wb") as file:
            for memory in planned.memory:
                if memory.constant is not None:
                    file.seek(memory.offset)
                    file.write(np.ascontiguousarray(memory.constant).tobytes())
            file.truncate(planned.weight_bytes)
        return {
            "inputs": _ports([p for p in lowered.inputs if p.name not in pools], planned.inputs),
            "outputs": _ports(lowered.outputs, planned.outputs),
            "kept": _ports([lowered.inputs[at] for at in places], planned.kept),
            "pools": [dataclasses.asdict(pool) for pool in kept],
            "kernels": len({call.kernel for call in planned.calls}),
            "calls": len(planned.calls),
            "arena_bytes": planned.arena_bytes,
            "weight_bytes": planned.weight_bytes,
        }

    def load(self, record: Mapping[str, Any], context: LoadContext) -> Executable:
        """Start the program.

        Raises:
            TargetError: what runs it is not there.
        """
        options = AotOptions.of(context.descriptor)
        place = options.require(context.descriptor)
        program, weights = _files(context)
        if options.in_page:
            scratch = tempfile.TemporaryDirectory(prefix="hal-page-")
            page = Path(scratch.name) / "page"
            page.mkdir()
            write_page(page, context.descriptor.name, record, program, weights, {})
            process = Supervised(_filled(options.run, place, page=page), context.descriptor.name)
            return AotExecutable(process, record, options.seconds, scratch)
        program.chmod(program.stat().st_mode | 0o111)
        native = options.machine == platform.machine()
        run = ("{program}",) if native else options.run
        command = [*_filled(run, place, program), str(weights)]
        process = Supervised(command, context.descriptor.name)
        return AotExecutable(process, record, options.seconds)

    def page(
        self,
        record: Mapping[str, Any],
        context: LoadContext,
        folder: Path,
        name: str,
        ranges: Mapping[str, tuple[int, int]],
    ) -> None:
        """Write a page; the program must be WebAssembly.

        Raises:
            UnsupportedError: it is not, or a browser has no arrays for its inputs or outputs.
        """
        write_page(folder, name, record, *_files(context), ranges)


class AotExecutable(Executable):
    """A program that runs."""

    def __init__(
        self,
        process: Supervised,
        record: Mapping[str, Any],
        seconds: float,
        scratch: tempfile.TemporaryDirectory[str] | None = None,
    ) -> None:
        """``scratch`` is removed when the program has ended."""
        self._process, self._seconds, self._scratch = process, seconds, scratch
        self._inputs: Sequence[Sequence[Any]] = record["inputs"]
        self._outputs: Sequence[Sequence[Any]] = record["outputs"]
        self._kept: Sequence[Sequence[Any]] = record.get("kept", [])
        self._pools = [KeptPool(**pool) for pool in record.get("pools", [])]
        # The caller's arrays that the program's own pools are a copy of.
        self._known: dict[str, Any] = {}

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Send arrays, wait for arrays.

        Raises:
            InputError: an input is missing or has another shape than the program was built for.
            TargetError: the program died or hangs.
        """
        data = [_sent(inputs, *port) for port in self._inputs]
        if self._kept:
            known = all(self._known.get(n) is inputs.get(n) for n, _, _ in self._kept)
            pools = [] if known else [_sent(inputs, *port) for port in self._kept]
            data = [b"\0" if known else b"\1", *pools, *data]
        self._known = {}

        def talk(stdin: IO[bytes], stdout: IO[bytes]) -> list[np.ndarray] | None:
            stdin.write(b"".join(data))
            stdin.flush()
            found = []
            for _, dtype, shape in self._outputs:
                stored = np.dtype(STORED_AS[dtype])
                size = int(np.prod(shape)) * stored.itemsize
                received = stdout.read(size)
                if len(received) != size:
                    return None
                found.append(np.frombuffer(bytearray(received), stored).reshape(shape))
            return found

        results = self._process.exchange("run", self._seconds, talk)
        found = {
            name: from_storage(array, dtype)
            for (name, dtype, _), array in zip(self._outputs, results, strict=True)
        }
        for pool in self._pools:
            pool.write(inputs[pool.input], found[pool.update], inputs)
            found[pool.output] = inputs[pool.input]
        self._known = {name: inputs[name] for name, _, _ in self._kept}
        return found

    def forget_state(self) -> None:
        """The program's pools are sent again before the next call."""
        self._known = {}

    def close(self) -> None:
        """End the program."""
        self._process.close()
        if self._scratch is not None:
            self._scratch.cleanup()


def _files(context: LoadContext) -> tuple[Path, Path]:
    """Program and weights."""
    program, weights = (
        Path(context.files.extracted(f"{context.folder}/{name}")) for name in (PROGRAM, WEIGHTS)
    )
    return program, weights


def _filled(
    command: Sequence[str],
    place: Environment,
    program: Path | None = None,
    page: Path | None = None,
) -> list[str]:
    known = {
        "files": place.files, "python": place.python, "here": HERE,
        "program": program, "page": page,
    }  # fmt: skip
    filled = []
    for word in command:
        for name, path in known.items():
            word = word.replace("{" + name + "}", str(path))
        filled.append(word)
    return filled


def _compile(command: Sequence[str], target: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise TargetError(
            f"the C compiler of {target!r} cannot run: {error}", f"hal targets setup {target}"
        ) from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        told = (lines or done.stderr.strip().splitlines() or [str(done.returncode)])[0]
        raise TargetError(
            f"the C compiler of {target!r} failed: {told}", "check its route in the descriptor"
        )


def _array(value: ir.Value) -> np.ndarray:
    tensor = value.const_value
    assert tensor is not None
    return to_storage(np.asarray(tensor.numpy()), tensor.dtype.name)


def _ports(ports: Sequence[Any], tensors: Sequence[Any]) -> list[list[Any]]:
    """Name, dtype and shape of each."""
    return [
        [port.name, port.dtype, list(tensor.shape)]
        for port, tensor in zip(ports, tensors, strict=True)
    ]


def _sent(inputs: Mapping[str, Any], name: str, dtype: str, shape: list[int]) -> bytes:
    if name not in inputs:
        raise InputError(f"input {name!r} is missing", "pass every input by name")
    array = np.asarray(inputs[name])
    if list(array.shape) != shape:
        raise InputError(
            f"input {name!r} has shape {list(array.shape)}, the program takes {shape}",
            "compile with other extents: --dim NAME=N",
        )
    return np.ascontiguousarray(to_storage(array, dtype)).tobytes()
