"""When ONNX Runtime repacks weights into copies of its own: at once, later, or never.

Repacking a float matrix makes products with 2 to 64 rows about twice as fast and those with one row
a sixth faster. It costs about a second for a gigabyte, and a private copy for each process, where
mapped weights are shared, appear at once and are dropped under memory pressure. (The runtime unmaps
what it has repacked, so nothing is held twice but a matrix that is looked up as well, as tied
embeddings are.) So:

- small models, and integer weights, whose kernels need it, are repacked when they are loaded;
- large float models stay mapped. Those that read tokens are loaded again, repacked, when calls of
  few rows turn out to be common: a batch that decodes, a server, speculation.

Measured on a Llama shape with 0.36 B parameters: 8 rows decode 3.1 to 3.8 times the tokens of one
when mapped, 4.2 to 5.2 when repacked; loading takes 0.4 and 3 to 4 s (beside other work).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime as ort

from hal.errors import TargetError
from hal.ir import Graph

_MAPPED_FROM = 64 << 20
"""Bytes of float matrices from which they stay mapped."""

_FEW_ROWS = range(2, 65)
_COMMON = 8
"""Calls of few rows after which there will be more of them."""

_INTEGER_WEIGHTS = ("MatMulNBits", "MatMulInteger", "QLinearMatMul", "DequantizeLinear")


def repacks_at_load(graph: Graph) -> bool:
    """Whether weights are repacked whenever the model is loaded."""
    large = 0
    for node in graph.graph.all_nodes():
        if node.op_type in _INTEGER_WEIGHTS:
            return True
        if node.op_type in ("MatMul", "Gemm"):
            large += sum(
                v.const_value.nbytes
                for v in node.inputs
                if v is not None and v.const_value is not None
            )
    return large <= _MAPPED_FROM


def token_input(graph: Graph) -> str:
    """The input of token ids, integers of ``[batch, sequence]``; nothing if there is none."""
    first = next(iter(graph.graph.inputs), None)
    if first is None or first.dtype is not ir.DataType.INT64 or first.shape is None:
        return ""
    return (first.name or "") if len(first.shape) == 2 else ""


class Repacking:
    """Opens a session with repacked weights when it has seen enough calls of few rows.

    ``reopen`` makes that session from ``files``. If one of them has been replaced since, or the
    session cannot be made (memory may be short), the old one goes on.
    """

    def __init__(
        self, tokens: str, reopen: Callable[[], ort.InferenceSession], files: Iterable[Path]
    ) -> None:
        self._tokens, self._reopen = tokens, reopen
        self._files = {path: _identity(path) for path in files}
        self._calls = 0

    def due(self, inputs: Mapping[str, Any]) -> bool:
        """Count one call; whether it is time. True at most once."""
        ids = inputs.get(self._tokens)
        if getattr(ids, "size", 0) not in _FEW_ROWS:
            return False
        self._calls += 1
        return self._calls == _COMMON

    def session(self) -> ort.InferenceSession | None:
        """The new session, or nothing where the old one must go on."""
        if any(_identity(path) != identity for path, identity in self._files.items()):
            return None
        try:
            return self._reopen()
        except TargetError:  # A session that runs is worth more than a faster one.
            return None


def _identity(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
