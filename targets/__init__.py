"""Targets: the registry of descriptors, the backends, and how a graph is spread over them.

The contract for a chip's own software is :class:`Backend`; see ``docs/vendors.md``. The names of
that contract are loaded on first use, so that listing targets needs no numerical library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hal.targets.backends import (
    BackendInfo,
    backend_digest,
    blamed,
    blaming,
    check_routes,
    code_digest,
    foreign,
    foreign_names,
    is_foreign,
    list_backends,
    load_backend,
    require_usable,
)
from hal.targets.guarded import guarded
from hal.targets.registry import (
    Registry,
    ResolvedTarget,
    TargetInfo,
    list_targets,
    resolve,
)

if TYPE_CHECKING:
    from hal.targets.backend import (
        HAL_API,
        Backend,
        BuildContext,
        Executable,
        LoadContext,
        Probe,
        Verdict,
        WeightStore,
    )

_CONTRACT = (
    "HAL_API",
    "Backend",
    "BuildContext",
    "Executable",
    "LoadContext",
    "Probe",
    "Verdict",
    "WeightStore",
)

__all__ = [
    "HAL_API",
    "Backend",
    "BackendInfo",
    "BuildContext",
    "Executable",
    "LoadContext",
    "Probe",
    "Registry",
    "ResolvedTarget",
    "TargetInfo",
    "Verdict",
    "WeightStore",
    "backend_digest",
    "blamed",
    "blaming",
    "check_routes",
    "code_digest",
    "foreign",
    "foreign_names",
    "guarded",
    "is_foreign",
    "list_backends",
    "list_targets",
    "load_backend",
    "require_usable",
    "resolve",
]


def __getattr__(name: str) -> Any:
    if name in _CONTRACT:
        return getattr(importlib.import_module("hal.targets.backend"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
