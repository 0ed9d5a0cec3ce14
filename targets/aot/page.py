"""A program of WebAssembly as a static page: the files that ``hal page`` writes.

==============  ====================================================================
``index.html``  a form: inputs, outputs, time of a call
``hal.js``      the module that a developer imports: ``load``, ``run``
``model.json``  name, inputs and outputs with dtype and shape, files and their bytes
``model.wasm``  the program
``weights.bin`` what it is loaded with
==============  ====================================================================
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from hal.errors import UnsupportedError
from hal.targets.tvm.dtypes import PLAIN, STORED_AS

WEB = Path(__file__).parent / "web"
FORMAT = 1
"""Version of ``model.json``; ``hal.js`` refuses others."""

_MAGIC = b"\0asm"
_ENTRY = b"hal_run"
_ARRAYS = {dtype: STORED_AS[dtype] for dtype in PLAIN - {ir.DataType.BFLOAT16}}
"""What JavaScript has typed arrays for, and its name in ``model.json``."""


def require_arrays(ports: Iterable[tuple[str, ir.DataType | None]]) -> None:
    """For inputs and outputs, by name, of a program that a browser runs.

    Raises:
        UnsupportedError: JavaScript has no array of such a dtype.
    """
    for name, dtype in ports:
        if dtype is not None and dtype not in _ARRAYS:
            raise UnsupportedError(
                f"{name!r} is {dtype.name}, and JavaScript has no array of that",
                "cast it to another dtype in the model",
            )


def write_page(
    folder: Path,
    name: str,
    record: Mapping[str, Any],
    program: Path,
    weights: Path,
    ranges: Mapping[str, tuple[int, int]],
) -> None:
    """Write the page of a model into an empty folder.

    Args:
        folder: exists.
        name: of the model.
        record: of the build: ``inputs`` and ``outputs`` with name, dtype and shape.
        program: a file of WebAssembly.
        weights: what it is loaded with.
        ranges: of integer inputs that are random: the least, and the one after the last [0, 2].

    Raises:
        UnsupportedError: the program is for something else, or was built by an older hal; an input
            or output is of a dtype that JavaScript has no array of.
    """
    code = program.read_bytes()
    if not code.startswith(_MAGIC):
        raise UnsupportedError(
            "the program is no WebAssembly, so no browser runs it",
            "choose a target whose programs are; see docs/edge-developers.md",
        )
    if _ENTRY not in code:
        raise UnsupportedError(
            "the program was built by an older hal and cannot be called from a page",
            "hal retarget BUNDLE --target TARGET -o OTHER",
        )
    for ports in (record["inputs"], record["outputs"]):
        require_arrays((port, ir.DataType[dtype]) for port, dtype, _ in ports)
    for file in ("index.html", "hal.js"):
        shutil.copyfile(WEB / file, folder / file)
    shutil.copyfile(program, folder / "model.wasm")
    shutil.copyfile(weights, folder / "weights.bin")
    about = {
        "format": FORMAT,
        "name": name,
        "program": {"file": "model.wasm", "bytes": len(code)},
        "weights": {"file": "weights.bin", "bytes": weights.stat().st_size},
        "inputs": [_port(port, ranges) for port in record["inputs"]],
        "outputs": [_port(port) for port in record["outputs"]],
    }
    (folder / "model.json").write_text(json.dumps(about, indent=1) + "\n")


def _port(
    port: Sequence[Any], ranges: Mapping[str, tuple[int, int]] | None = None
) -> dict[str, Any]:
    name, dtype, shape = port
    kind = ir.DataType[dtype]
    found: dict[str, Any] = {"name": name, "dtype": _ARRAYS[kind], "shape": shape}
    if ranges is not None and not kind.is_floating_point():
        found["from"], found["below"] = ranges.get(name, (0, 2))
    return found
