"""Names of the ops that exist between this backend's own steps only."""

from __future__ import annotations

DOMAIN = "hal.tvm"

CONVOLUTION = "Convolution"

EXPANDED = "expanded"
"""Attribute of a convolution: the weights were codes, and are floats in the build."""
