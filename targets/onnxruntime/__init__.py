"""ONNX Runtime as a backend: legalization, builds that share the bundle's weights, sessions."""

from hal.targets.onnxruntime.backend import OnnxRuntimeBackend

__all__ = ["OnnxRuntimeBackend"]
