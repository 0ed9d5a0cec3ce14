"""A content-addressed cache on disk, safe when processes run in parallel or are killed.

Entries are written under a temporary name in the same folder and renamed, which is atomic: a reader
sees a whole entry or none. Two writers of one key write the same content, so the last rename wins
harmlessly. Leftovers of killed writers are removed after a day.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_TEMPORARY = ".tmp-"
_LEFTOVER_SECONDS = 24 * 3600
_YOUNG_SECONDS = 60


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


@contextlib.contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Yield a new folder in ``parent`` that is removed when the block ends.

    What writers of the same prefix left when they were killed is removed first; a folder whose
    writer is alive is locked and stays.
    """
    for path in parent.glob(glob.escape(prefix) + "*"):
        _remove_abandoned(path)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    lock = _lock(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


@contextlib.contextmanager
def removing_abandoned(parent: Path, prefix: str) -> Iterator[None]:
    """Remove what writers of the prefix make during the block and leave there, killed."""
    pattern = glob.escape(prefix) + "*"
    before = set(parent.glob(pattern))
    try:
        yield
    finally:
        for path in set(parent.glob(pattern)) - before:
            lock = _lock(path)
            if lock is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)


def _lock(folder: Path) -> int | None:
    """An open lock on a folder, released with the process; None where it is taken or unknown."""
    if sys.platform == "win32":
        return None
    import fcntl

    handle = None
    try:
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if handle is not None:
            os.close(handle)
        return None
    return handle


def _remove_abandoned(path: Path) -> None:
    with contextlib.suppress(OSError):
        if time.time() - path.stat().st_mtime < _YOUNG_SECONDS:
            return  # its writer may be about to lock it
    lock = _lock(path)
    if lock is not None:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _sweep(folder: Path) -> None:
    for path in folder.glob(_TEMPORARY + "*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
