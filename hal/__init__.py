"""hal: compile a model once, run it on any described chip.

::

    import hal

    bundle = hal.compile("model.onnx", target="host", output="model.hal")
    session = bundle.session()
    y = session(x)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hal.errors import (
    BundleError,
    CheckFailed,
    DescriptorError,
    ExportError,
    GraphError,
    HalError,
    InputError,
    MissingExtraError,
    ModelError,
    TargetError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from hal.bundle import Bundle, load
    from hal.compiler import compile
    from hal.runtime.evaluation import evaluate
    from hal.runtime.saved_state import SavedState
    from hal.runtime.session import Session
    from hal.targets import list_targets

__version__ = "0.1.0"

__all__ = [
    "Bundle",
    "BundleError",
    "CheckFailed",
    "DescriptorError",
    "ExportError",
    "GraphError",
    "HalError",
    "InputError",
    "MissingExtraError",
    "ModelError",
    "SavedState",
    "Session",
    "TargetError",
    "UnsupportedError",
    "compile",
    "evaluate",
    "list_targets",
    "load",
]

# Looked up on first use, so that `import hal` and `hal --help` stay fast.
_LAZY = {
    "Bundle": "hal.bundle",
    "SavedState": "hal.runtime.saved_state",
    "Session": "hal.runtime.session",
    "compile": "hal.compiler",
    "evaluate": "hal.runtime.evaluation",
    "list_targets": "hal.targets",
    "load": "hal.bundle",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'hal' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
