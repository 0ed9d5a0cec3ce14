"""Folders of a run: for layers that took long, if it is interrupted, and for what can wait."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hal.runtime.cache import cache_folder

_WEEK = 7 * 24 * 3600


@contextlib.contextmanager
def resumable(model: Any, calibration: Any, request: Any) -> Iterator[Path | None]:
    """A folder for finished layers, which stays if the block is left by an exception.

    None where the work cannot be known again: ``model`` and ``calibration`` have to be files, not
    objects, and ``request`` is what is asked of them. What has waited for a week is removed.
    """
    if not isinstance(model, str | Path) or not isinstance(calibration, str | Path):
        yield None
        return
    parent = cache_folder("unfinished")
    for old in parent.iterdir():
        if time.time() - old.stat().st_mtime > _WEEK:
            shutil.rmtree(old, ignore_errors=True)
    name = f"{Path(model).absolute()} {Path(calibration).absolute()} {request}"
    folder = parent / hashlib.sha256(name.encode()).hexdigest()[:16]
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def beside(folder: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder for what need not stay in memory, on the disk that the bundle is written to."""
    return tempfile.TemporaryDirectory(
        prefix=".hal-", dir=folder.parent, ignore_cleanup_errors=True
    )


__all__ = ["beside", "resumable"]
