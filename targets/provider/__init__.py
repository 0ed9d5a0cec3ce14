"""Vendors' execution providers for ONNX Runtime, in environments and processes of their own."""

from hal.targets.provider.backend import ProviderBackend
from hal.targets.provider.options import ProviderOptions, options_of

__all__ = ["ProviderBackend", "ProviderOptions", "options_of"]
