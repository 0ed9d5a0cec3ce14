"""The TVM backend: ONNX IR to Relax and TIR, compiled by LLVM; needs the extra ``tvm``."""
