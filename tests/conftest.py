"""Settings for all tests: a compile cache of their own."""

import os
import shutil
import tempfile

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") or "HAL_CACHE" in os.environ:
        return  # workers inherit the main process's folder
    folder = tempfile.mkdtemp(prefix="hal-test-cache-")
    os.environ["HAL_CACHE"] = folder
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
