"""The TVM backend: ONNX IR to Relax and TIR, compiled by LLVM; needs the extra ``tvm``.

lowered = lower(graph, Shaping(lanes=16))      # hal.targets.tvm.lower
run = compile_model(proto)                     # hal.targets.tvm.direct: for tests
"""

from hal.targets.tvm.backend import TvmBackend

__all__ = ["TvmBackend"]
