"""The artifact on disk: files, manifest, weights, builds."""

from hal.bundle.bundle import Bundle, load

__all__ = ["Bundle", "load"]
