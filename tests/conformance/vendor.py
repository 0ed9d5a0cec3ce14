"""A vendor's chip on ONNX Runtime, whose software does something wrong when told to."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests import files

TARGET = "acme-1"

CODE = """
import os
import time

import numpy as np
from hal.targets import Executable, Verdict
from hal.targets.onnxruntime import OnnxRuntimeBackend

MODE = "@MODE@"

class AcmeBackend(OnnxRuntimeBackend):
    name = "acme"

    def supports(self, node, descriptor):
        if MODE == "picky" and node.op_type == "Relu":
            return Verdict.no("no comparisons in hardware")
        return super().supports(node, descriptor)

    def build(self, graph, context):
        if MODE == "exit" and any(n.op_type == "Relu" for n in graph.graph):
            os._exit(3)
        if MODE == "hang" and any(n.op_type == "Relu" for n in graph.graph):
            time.sleep(3600)
        return super().build(graph, context)

    def load(self, record, context):
        return Changed(super().load(record, context))

class Changed(Executable):
    def __init__(self, inner):
        self.inner = inner

    def run(self, inputs):
        found = self.inner.run(inputs)
        if MODE == "half":
            found = {n: v.astype(np.float16) for n, v in found.items()}
        if MODE == "wrong":
            found = {n: v + 1 for n, v in found.items()}
        return found
"""


def use_vendor(monkeypatch: pytest.MonkeyPatch, folder: Path, mode: str = "") -> None:
    """Install the package of the chip :data:`TARGET`; ``mode`` says what is wrong with it."""
    files.vendor_package(
        folder / "site",
        "acme",
        CODE.replace("@MODE@", mode),
        "[hal.backends]\nacme = acme:AcmeBackend\n",
    )
    (folder / "acme-1.toml").write_text(
        f'schema = 1\nname = "{TARGET}"\nkind = "npu"\n[routes.acme]\nbackend = "acme"\n'
    )
    monkeypatch.delitem(sys.modules, "acme", raising=False)
    monkeypatch.syspath_prepend(str(folder / "site"))
    monkeypatch.setenv("HAL_TARGET_PATH", str(folder / "acme-1.toml"))
    monkeypatch.setenv("HAL_CACHE", str(folder / "cache"))
