"""Where a bundle goes: written under a temporary name next to the output, renamed at the end."""

from __future__ import annotations

import contextlib
import errno
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from hal.bundle.bundle import Bundle, load
from hal.bundle.files import BundleFiles, checked_path, pack
from hal.bundle.manifest import MANIFEST, Manifest
from hal.errors import BundleError
from hal.runtime.cache import removing_abandoned, scratch_folder


@contextlib.contextmanager
def bundle_writer(output: str | Path | None) -> Iterator[tuple[Path, Callable[[Path], Bundle]]]:
    """Yield a scratch folder and the function that makes it the output; clean up otherwise.

    Raises:
        InputError: the output is no path.
        BundleError: the output cannot be written (missing folder, no permission, no space).
    """
    if output is None:
        scratch = tempfile.TemporaryDirectory(prefix="hal-")
        folder = Path(scratch.name) / "bundle"
        folder.mkdir()
        with readable_os_errors(folder):
            yield folder, lambda path: Bundle(BundleFiles.open(path), _manifest_of(path), scratch)
        return
    goal = checked_path(output, "output")
    with readable_os_errors(goal):
        if not goal.parent.is_dir():
            raise BundleError(f"folder {goal.parent} does not exist", f"mkdir -p {goal.parent}")
        if goal.is_dir() and any(goal.iterdir()) and not (goal / MANIFEST).exists():
            raise BundleError(
                f"{goal} is a folder that is not a bundle", "choose another output name"
            )
        if goal.exists() and not goal.is_dir() and not _is_bundle_file(goal):
            raise BundleError(
                f"{goal} exists and is not a bundle", "choose another output name, or remove it"
            )
        with scratch_folder(goal.parent, _prefix(goal)) as scratch_path:
            folder = scratch_path / "bundle"
            folder.mkdir()
            yield folder, lambda path: _publish(path, goal)


def without_leftovers(output: Path) -> contextlib.AbstractContextManager[None]:
    """A block after which nothing half-written lies beside ``output``, even if a writer died."""
    return removing_abandoned(output.parent, _prefix(output))


def _prefix(goal: Path) -> str:
    return f".{goal.name}.tmp-"


def _is_bundle_file(path: Path) -> bool:
    try:
        return MANIFEST in BundleFiles.open(path)
    except BundleError:
        return False


def _publish(folder: Path, goal: Path) -> Bundle:
    result = folder
    if goal.suffix == ".hal":
        result = folder.parent / "packed.hal"
        pack(folder, result)
    old = None
    if goal.is_dir() or (goal.exists() and result.is_dir()):
        old = folder.parent / "old"
        goal.rename(old)
    try:
        result.rename(goal)
    except OSError:
        if old is not None:
            old.rename(goal)
        raise
    return load(goal)


def _manifest_of(folder: Path) -> Manifest:
    return Manifest.model_validate_json((folder / MANIFEST).read_text())


@contextlib.contextmanager
def readable_os_errors(where: Path) -> Iterator[None]:
    """A block whose failures to write are told in a sentence.

    Raises:
        BundleError: no space, no permission, a name that is too long.
    """
    reasons = {
        errno.ENOSPC: "no space left on the device",
        errno.EDQUOT: "the disk quota is used up",
        errno.EROFS: "the file system is read-only",
        errno.EACCES: "permission denied",
        errno.EPERM: "permission denied",
        errno.ENAMETOOLONG: "the name is too long",
    }
    try:
        yield
    except OSError as error:
        if error.errno not in reasons:
            raise
        raise BundleError(
            f"cannot write {where}: {reasons[error.errno]}", "choose another output, or make room"
        ) from error
