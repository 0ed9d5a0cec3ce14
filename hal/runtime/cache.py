"""A content-addressed cache on disk, safe when processes run in parallel or are killed.

Entries are written under a temporary name in the same folder and renamed, which is atomic: a reader
sees a whole entry or none. Two writers of one key write the same content, so the last rename wins
harmlessly. Leftovers of killed writers are removed after a day.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_TEMPORARY = ".tmp-"
_LEFTOVER_SECONDS = 24 * 3600


def cache_folder(kind: str) -> Path:
    """Folder for cache entries of one kind: ``$HAL_CACHE`` or the user's cache folder."""
    chosen = os.environ.get("HAL_CACHE")
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = (Path(chosen) if chosen else user / "hal") / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def publish_file(folder: Path, name: str, data: memoryview | bytes) -> Path:
    """Store bytes under their own SHA-256 and return the path ``<folder>/<digest>/<name>``."""
    entry = folder / hashlib.sha256(data).hexdigest()
    if not (entry / name).exists():
        with entry_writer(entry) as temporary:
            (temporary / name).write_bytes(data)
    return entry / name


@contextlib.contextmanager
def entry_writer(entry: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``entry`` if the block ends without an exception."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    _sweep(entry.parent)
    temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=entry.parent))
    try:
        yield temporary
        try:
            temporary.rename(entry)
        except OSError:
            if not entry.is_dir():  # otherwise another process published the same content first
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sweep(folder: Path) -> None:
    for path in folder.glob(_TEMPORARY + "*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
