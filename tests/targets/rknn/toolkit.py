"""A stand-in for rknn-toolkit2, so that everything around it runs where it is not installed.

It speaks as the toolkit does (return codes, exceptions, a printed table of layers), and computes with
ONNX Runtime in float16's precision. ``Det`` is refused, ``Sin`` is left to the processor, ``Sinh`` kills
the process, ``Cosh`` is fine alone but not beside another node, and ``Elu`` is computed wrongly.
"""

from __future__ import annotations

import sys
from pathlib import Path

SOURCE = """
import os
from pathlib import Path
import numpy as np
import onnx
import onnxruntime


class RKNN:
    def __init__(self, verbose=False):
        assert verbose, "without it there is no table of layers"

    def config(self, target_platform):
        return 0 if target_platform == "chip" else -1

    def load_onnx(self, model):
        proto = onnx.load(model)
        opset = proto.opset_import[0].version
        if opset > 19:
            raise ValueError(f"Traceback\\n  File x\\nValueError: Unsupport onnx opset {opset}, need <= 19!\\n")
        self.session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        self.proto = proto
        return 0

    def build(self, do_quantization):
        assert not do_quantization
        Path("check0_base_optimize.onnx").write_bytes(b"debris")
        nodes = list(self.proto.graph.node)
        ops = [n.op_type for n in nodes]
        if "Sinh" in ops:
            os.abort()
        if "Det" in ops or ("Cosh" in ops and len(ops) > 1):
            os.write(1, b"\\x1b[1;31mE\\x1b[0m build: Det is not supported\\n")
            return -1
        rows = [("InputOperator", "CPU", "InputOperator:x")]
        rows += [(op, "CPU" if op in ("Sin", "Reshape") else "NPU", f"{op}:{n.name}_fused") for op, n in zip(ops, nodes)]
        for index, (op, place, name) in enumerate(rows):
            os.write(1, f"D RKNN: [06:41:00.466] {index}  {op}  FLOAT16  {place}  (1,2)  (1,2)  0/0/0  0  {name}\\n".encode())
        return 0

    def export_rknn(self, path):
        Path(path).write_bytes(b"RKNN" + self.proto.SerializeToString())
        return 0

    def init_runtime(self):
        return 0

    def inference(self, inputs, data_format):
        assert len(data_format) == len(inputs)
        wanted = ["nchw" if a.ndim == 4 else "undefined" for a in inputs]
        assert data_format == wanted, data_format
        names = [v.name for v in self.session.get_inputs()]
        narrow = [a.astype(np.float16).astype(a.dtype) for a in inputs]
        results = self.session.run(None, dict(zip(names, narrow)))
        wrong = any(n.op_type == "Elu" for n in self.proto.graph.node)
        return [r + 1 for r in results] if wrong else results

    def release(self):
        pass
"""


def install(venv: Path) -> None:
    """Make ``venv`` an environment whose interpreter is this one, with the stand-in in it."""
    api = venv / "lib" / "rknn" / "api"
    api.mkdir(parents=True)
    (api.parent / "__init__.py").touch()
    (api / "__init__.py").write_text(SOURCE)
    python = venv / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nPYTHONPATH={venv / "lib"} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
