"""Settings for all tests: a compile cache of their own, and which of them stay together."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from typing import Any

import pytest

ONE_PROCESS = (
    "tests/cli/test_language_models.py",
    "tests/compiler/test_compile.py",
    "tests/docs",
    "tests/frontends/test_recurrence.py",
    "tests/runtime/test_picks.py",
    "tests/server/test_embeddings.py",
    "tests/server",
    "tests/test_cache_precision.py",
    "tests/test_minilm.py",
)
"""Files and folders whose tests share a model that takes long to compile. Where test processes share
the work, one of them does all of these, and compiles it once."""

_FAMILY = re.compile(r"^tests/test_families\.py::.*[\[-]([a-z][a-z0-9_]*)[\]-]")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") or "HAL_CACHE" in os.environ:
        return  # workers inherit the main process's folder
    folder = tempfile.mkdtemp(prefix="hal-test-cache-")
    os.environ["HAL_CACHE"] = folder
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """``--dist loadgroup``, by :func:`group`: pytest-xdist 3.8 loses its marks with pytest 9.2."""
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    return Scheduling(config, log)


def group(nodeid: str) -> str:
    """Tests with the same answer run in the same process."""
    family = _FAMILY.match(nodeid)
    if family:
        return family[1]
    return next((name for name in ONE_PROCESS if nodeid.startswith(name)), nodeid)
