"""Loads example scripts as modules."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "examples"

Load = Callable[[str], ModuleType]


@pytest.fixture(scope="session")
def load() -> Load:
    """``load("train_digits")``; examples find each other as they do when they are run."""

    def loaded(name: str) -> ModuleType:
        if str(FOLDER) not in sys.path:
            sys.path.append(str(FOLDER))
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
        return sys.modules[name]

    return loaded
