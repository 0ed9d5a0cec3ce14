"""Bundle files on disk: a directory, or one zip whose members are stored uncompressed and aligned.

Both are read through :class:`BundleFiles`; backends see only ``locate``, ``mapped`` and
``extracted``, so a weight is memory-mapped either way.
"""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from hal.errors import BundleError, InputError
from hal.runtime.cache import cache_folder, publish_file
from hal.targets.backend import WeightStore

ALIGNMENT = 4096
"""Members of a zip start at multiples of this many bytes, so that pages map one to one."""

_PADDING_FIELD = 0xD935  # extra-field id that Android's zipalign uses for padding


def checked_path(value: Any, what: str) -> Path:
    """``value`` as a path; ``what`` it is for goes into the error.

    Raises:
        InputError: it is no path, is empty (which the system reads as this folder), or holds NUL.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise InputError(f"{what}={value!r} is not a path", "pass a string or a pathlib.Path")
    text = os.fspath(value)
    if not isinstance(text, str) or not text or "\0" in text:
        raise InputError(f"{what}={text!r} cannot be the name of a file", "check the path")
    return Path(text)


def checked_member(name: str) -> str:
    """Return ``name`` if it is a relative path that stays inside the bundle.

    Raises:
        BundleError: it is absolute, climbs out, or is not in normal form.
    """
    path = PurePosixPath(name)
    bad = path.is_absolute() or ".." in path.parts or "\\" in name or not name
    if bad or str(path) != name:
        raise BundleError(
            f"bundle names a file outside itself: {name!r}", "do not use this bundle; rebuild it"
        )
    return name


class BundleFiles(WeightStore):
    """Read access to the members of a bundle by relative name."""

    def __init__(self, root: Path, members: dict[str, tuple[Path, int, int]]) -> None:
        self.root = root
        self._members = members
        self._identity = _identity(root)
        self._maps: dict[Path, mmap.mmap] = {}

    @classmethod
    def open(cls, path: Path) -> BundleFiles:
        """Open a directory or a zip.

        Raises:
            BundleError: there is nothing at ``path``, or it is neither.
        """
        if path.is_dir():
            return cls(path, _directory_members(path))
        if not path.exists():
            raise BundleError(f"no bundle at {path}", "check the path; `hal compile` makes bundles")
        return cls(path, _zip_members(path))

    @property
    def is_directory(self) -> bool:
        """Whether the bundle is a directory rather than one file."""
        return self.root.is_dir()

    def names(self) -> list[str]:
        """Names of all members, sorted."""
        return sorted(self._members)

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def locate(self, relative: str) -> tuple[Path, int, int]:
        """Real file, offset and length of a member.

        Raises:
            BundleError: the bundle has no such member, or was replaced since it was opened.
        """
        if _identity(self.root) != self._identity:
            raise BundleError(
                f"bundle {self.root} was replaced or removed since it was opened", "load it again"
            )
        found = self._members.get(checked_member(relative))
        if found is None:
            raise BundleError(
                f"bundle {self.root} lacks {relative!r}", "the bundle is incomplete; rebuild it"
            )
        return found

    def mapped(self, relative: str) -> memoryview:
        """The member's bytes, memory-mapped read-only."""
        path, offset, length = self.locate(relative)
        if length == 0:
            return memoryview(b"")
        if path not in self._maps:
            with path.open("rb") as stream:
                self._maps[path] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        return memoryview(self._maps[path])[offset : offset + length]

    def read(self, relative: str) -> bytes:
        """The member's bytes, copied."""
        return bytes(self.mapped(relative))

    def extracted(self, relative: str) -> Path:
        """A real path holding the member; for a zip, a copy in the cache named by its digest."""
        path, _, _ = self.locate(relative)
        if self.is_directory:
            return path
        return publish_file(
            cache_folder("extracted"), PurePosixPath(relative).name, self.mapped(relative)
        )


def _identity(root: Path) -> tuple[int, ...] | None:
    """What tells this bundle from another that takes its name; members of a folder may be added."""
    try:
        stat = root.stat()
    except OSError:
        return None
    known = (stat.st_dev, stat.st_ino)
    return known if root.is_dir() else (*known, stat.st_size, stat.st_mtime_ns)


def _directory_members(root: Path) -> dict[str, tuple[Path, int, int]]:
    members: dict[str, tuple[Path, int, int]] = {}
    real_root = root.resolve()
    for path in sorted(root.rglob("*")):
        if path.is_dir():
            continue
        name = path.relative_to(root).as_posix()
        if not path.resolve().is_relative_to(real_root):
            raise BundleError(
                f"bundle file {name!r} is a link that leaves the bundle", "do not use this bundle"
            )
        members[name] = (path, 0, path.stat().st_size)
    return members


def _zip_members(path: Path) -> dict[str, tuple[Path, int, int]]:
    members: dict[str, tuple[Path, int, int]] = {}
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as stream:
            for info in archive.infolist():
                if info.is_dir():
                    continue
                if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                    raise BundleError(
                        f"bundle member {info.filename!r} is compressed",
                        "bundles are stored uncompressed; rebuild it with `hal compile`",
                    )
                start = _data_offset(stream, info)
                members[checked_member(info.filename)] = (path, start, info.file_size)
    except (zipfile.BadZipFile, struct.error, OSError, ValueError, NotImplementedError) as error:
        raise BundleError(
            f"{path} is not a bundle: {error}", "expected a directory or .hal file of `hal compile`"
        ) from error
    size = path.stat().st_size
    for name, (_, offset, length) in members.items():
        if offset + length > size:
            raise BundleError(f"bundle {path} is truncated at {name!r}", "copy it again")
    return members


def _data_offset(stream: BinaryIO, info: zipfile.ZipInfo) -> int:
    stream.seek(info.header_offset)
    header = stream.read(30)
    if header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"damaged header of {info.filename!r}")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    return info.header_offset + 30 + int(name_length) + int(extra_length)


def pack(folder: Path, target: Path) -> None:
    """Write ``folder`` as one aligned, uncompressed zip; members are removed as they go.

    Removing keeps the disk space needed near one bundle rather than two.
    """
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            name = path.relative_to(folder).as_posix()
            size = path.stat().st_size
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.external_attr = 0o644 << 16
            info.file_size = size
            big = size >= zipfile.ZIP64_LIMIT // 2
            assert archive.fp is not None
            start = archive.fp.tell() + 30 + len(name.encode()) + (20 if big else 0) + 4
            padding = -start % ALIGNMENT
            info.extra = struct.pack("<HH", _PADDING_FIELD, padding) + b"\0" * padding
            with path.open("rb") as source, archive.open(info, "w", force_zip64=big) as sink:
                shutil.copyfileobj(source, sink, 16 << 20)
            path.unlink()


def unpack(
    files: BundleFiles, folder: Path, *, skip: Callable[[str], bool] = lambda _: False
) -> None:
    """Copy the members for which ``skip`` is false into ``folder``.

    Copies, not hard links: readers of ONNX external data refuse files with several links.
    """
    for name in files.names():
        if skip(name):
            continue
        path, _, length = files.locate(name)
        goal = folder / name
        goal.parent.mkdir(parents=True, exist_ok=True)
        if files.is_directory:
            shutil.copyfile(path, goal)
            continue
        with goal.open("wb") as sink:
            data = files.mapped(name)
            for start in range(0, length, 16 << 20):
                sink.write(data[start : start + (16 << 20)])
