"""The compiler's side, in a process of its own: from a lowered module to the files of a build.

``python -m hal.targets.cuda.worker FOLDER`` reads ``request.json`` and ``graph.onnx`` there, writes
the files and at last ``answer.json``. Schedules and code generators of TVM, and NVIDIA's compiler,
may crash: then there is no answer.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from hal.errors import HalError, TargetError
from hal.ir import Graph

REQUEST, GRAPH, ANSWER = "request.json", "graph.onnx", "answer.json"
LIBRARY = "lib.so"


def work(folder: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``lib.so`` and the kernels; their names and what is known of them.

    Raises:
        UnsupportedError: a kernel cannot be scheduled, compiled, or needs more than the chip has.
        TargetError: a tool is missing or fails.
    """
    from hal.targets.cuda.emulated import compile_for_host
    from hal.targets.cuda.pipeline import generate
    from hal.targets.tvm.lower import lower
    from hal.targets.tvm.lowering import Shaping

    target, output = request["target"], Path(request["output"])
    model = ir.load(folder / GRAPH)
    ir.external_data.set_base_dir(model.graph, request["weights"])
    lowered = lower(Graph.from_model(model), Shaping(plain=True))
    made = generate(lowered.module, target, emulated=request["emulated"])
    _link(made.host, output / LIBRARY, request["link"])
    if request["emulated"]:
        name = "kernels.so"
        compile_for_host(made.source, made.kernels, output / name)
        facts = {kernel.name: dataclasses.asdict(kernel) for kernel in made.kernels}
    else:
        name = f"kernels.{request['binary']}"
        facts = _binary(made, request, folder, output / name)
    return {"kernels": name, "functions": facts, "weights": [v.name for v in lowered.weights]}


def _binary(made: Any, request: Mapping[str, Any], folder: Path, path: Path) -> dict[str, Any]:
    """Write a cubin or PTX; a cubin is made of both, to be looked at."""
    from hal.targets.cuda.inspection import require_fit, usage_of
    from hal.targets.cuda.nvrtc import compile_source

    toolkit, target = Path(request["toolkit"]), request["target"]
    cubin = folder / "kernels.cubin"
    cubin.write_bytes(compile_source(made.source, target["arch"], toolkit))
    usage = usage_of(cubin, toolkit)
    require_fit(made.kernels, usage, target)
    if request["binary"] == "ptx":
        path.write_bytes(compile_source(made.source, target["arch"], toolkit, ptx=True))
    else:
        path.write_bytes(cubin.read_bytes())
    return {
        kernel.name: {**dataclasses.asdict(kernel), **dataclasses.asdict(usage[kernel.name])}
        for kernel in made.kernels
    }


def _link(host: Any, path: Path, command: list[str]) -> None:
    import subprocess

    from hal.targets.tvm.compilation import export

    if not command:
        export(host, path)
        return

    def linked(output: str, objects: Any, **_: Any) -> None:
        done = subprocess.run(
            [*command, *map(str, objects), "-o", output],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            told = (done.stderr.strip().splitlines() or [str(done.returncode)])[0]
            raise TargetError(f"linking {path.name} failed: {told}", "check the route's `link`")

    host.export_library(str(path), fcompile=linked)


def main() -> None:
    """Do what the folder of the only argument asks for."""
    folder = Path(sys.argv[1])
    request = json.loads((folder / REQUEST).read_text())
    try:
        answer = work(folder, request)
    except HalError as error:
        answer = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
    except Exception as error:  # noqa: BLE001 - TVM raises its own kinds
        lines = str(error).strip().splitlines()
        answer = {
            "error": "UnsupportedError",
            "message": f"TVM could not compile the graph: {lines[-1] if lines else repr(error)}",
            "hint": "report this; meanwhile use another route",
        }
    (folder / ANSWER).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
