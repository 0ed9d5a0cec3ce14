"""Programs without a runtime, linked ahead of time."""

from hal.targets.aot.backend import AotBackend
from hal.targets.aot.options import AotOptions

__all__ = ["AotBackend", "AotOptions"]
