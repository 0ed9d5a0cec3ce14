"""What the tests of the compiler share."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import hal
from tests import files

ROUTE = "host:onnxruntime"


def x_of(rows: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, files.HIDDEN)).astype(np.float32)


def names_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def is_right(bundle: hal.Bundle, target: str | None = None, rows: int = 3, seed: int = 0) -> bool:
    """Whether a bundle of the small ONNX model computes what numpy does."""
    x = x_of(rows)
    with bundle.session(target) as session:
        return bool(np.allclose(session(x), files.mlp_expected(x, seed), atol=1e-5))


VENDOR = '''
import onnx_ir as ir
from hal.targets import Backend, Verdict
from hal.targets.onnxruntime import OnnxRuntimeBackend

class AcmeBackend(OnnxRuntimeBackend):
    """Runs on ONNX Runtime under a vendor's name; MODE says what is wrong with it."""
    name = "acme"
    mode = "MODE"

    def legalize(self, graph, descriptor):
        if self.mode == "wrong":
            graph = graph.clone()
            for node in graph.graph:
                if node.op_type == "Relu":
                    node.op_type = "LeakyRelu"
        return super().legalize(graph, descriptor)

    def supports(self, node, descriptor):
        if self.mode == "picky" and node.op_type == "Relu":
            return Verdict.no("no comparisons in hardware")
        return super().supports(node, descriptor)
'''


def use_vendor(monkeypatch: pytest.MonkeyPatch, folder: Path, mode: str) -> None:
    """Install a vendor's package: a chip ``acme-1`` reached through its own backend ``acme``."""
    files.vendor_package(
        folder / "site",
        "acme",
        VENDOR.replace("MODE", mode),
        "[hal.backends]\nacme = acme:AcmeBackend\n",
    )
    (folder / "acme-1.toml").write_text(
        'schema = 1\nname = "acme-1"\nkind = "npu"\n[routes.acme]\nbackend = "acme"\n'
    )
    monkeypatch.delitem(sys.modules, "acme", raising=False)
    monkeypatch.syspath_prepend(str(folder / "site"))
    monkeypatch.setenv("HAL_TARGET_PATH", str(folder / "acme-1.toml"))
    monkeypatch.setenv("HAL_CACHE", str(folder / "cache"))
