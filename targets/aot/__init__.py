"""Programs without a runtime, linked ahead of time."""

from hal.targets.aot.backend import AotBackend
from hal.targets.aot.options import AotOptions, options_of

__all__ = ["AotBackend", "AotOptions", "options_of"]
