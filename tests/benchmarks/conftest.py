"""Makes ``benchmarks/speed`` importable without its folder, whose modules' names others look for."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[2] / "benchmarks" / "speed"


def _import_package() -> None:
    spec = importlib.util.spec_from_file_location(
        "speed", _PACKAGE / "__init__.py", submodule_search_locations=[str(_PACKAGE)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["speed"] = module
    spec.loader.exec_module(module)


_import_package()
