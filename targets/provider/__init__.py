"""Vendors' execution providers for ONNX Runtime, in environments and processes of their own."""

from hal.targets.provider.backend import ProviderBackend
from hal.targets.provider.options import ProviderOptions

__all__ = ["ProviderBackend", "ProviderOptions"]
