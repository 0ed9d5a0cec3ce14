"""``manifest.json``: what is in a bundle, checked before anything else is read."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pydantic

from hal.bundle.files import BundleFiles, checked_member
from hal.errors import BundleError
from hal.runtime.cache import cache_folder

FORMAT = 1
"""Version of the bundle format that this hal writes; newer ones are refused."""

MANIFEST = "manifest.json"
MANIFEST_DIGEST = "manifest.sha256"
GRAPH = "graph.onnx"

_REMEMBER_BYTES = 64 << 20  # digests of files this large are remembered between loads


class FileRecord(pydantic.BaseModel):
    """Size in bytes and SHA-256 of one member."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)
    size: int
    sha256: str


class TensorRecord(pydantic.BaseModel):
    """Name, dtype and dims of one input or output."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)
    name: str
    dtype: str
    dims: list[int | str] | None
    container: str = "tensor"


class BuildRecord(pydantic.BaseModel):
    """One target's build: its folder, segments, where each node went, and how it was verified.

    ``picks``: it has an input that says which positions' logits it computes. ``step``: extents of
    a build with carried state and static shapes (:class:`hal.ir.step.Step`).
    """

    model_config = pydantic.ConfigDict(extra="forbid")
    target: str
    route: str
    backend: str
    folder: str
    descriptor: dict[str, Any]
    segments: list[dict[str, Any]]
    placement: dict[str, Any]
    toolchain: dict[str, str]
    cache: dict[str, Any] | None = None
    picks: bool = False
    step: dict[str, int] | None = None
    verification: dict[str, Any] | None = None


class Manifest(pydantic.BaseModel):
    """The bundle's table of contents; see ``docs/bundle-format.md``."""

    model_config = pydantic.ConfigDict(extra="forbid")
    format: int = FORMAT
    name: str
    task: str
    producer: dict[str, str]
    source: dict[str, Any]
    inputs: list[TensorRecord]
    outputs: list[TensorRecord]
    state: list[dict[str, Any]]
    metadata: dict[str, Any]
    weights: dict[str, int]
    passes: list[dict[str, Any]]
    samples: str | None = None
    state_digest: str | None = None
    builds: dict[str, BuildRecord] = {}
    files: dict[str, FileRecord] = {}


def write_manifest(
    manifest: Manifest, folder: Path, known: dict[str, FileRecord] | None = None
) -> None:
    """Digest every file under ``folder`` and write ``manifest.json`` and ``manifest.sha256``.

    ``known`` holds records that need not be computed again (files copied from a checked bundle).
    """
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    names = [n for n in names if n not in (MANIFEST, MANIFEST_DIGEST)]
    known = known or {}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        records = pool.map(lambda n: known.get(n) or digest_path(folder / n), names)
        manifest.files = dict(zip(names, records, strict=True))
    text = manifest.model_dump_json(indent=1).encode() + b"\n"
    (folder / MANIFEST).write_bytes(text)
    digest = hashlib.sha256(text).hexdigest()
    (folder / MANIFEST_DIGEST).write_text(f"{digest}  {MANIFEST}\n")


def read_manifest(files: BundleFiles) -> Manifest:
    """Read and check the manifest, and check every member against it.

    Raises:
        BundleError: no manifest, damaged manifest, newer format, or a member that is missing, has
            another size, or another digest.
    """
    where = files.root
    if MANIFEST not in files:
        raise BundleError(
            f"{where} has no {MANIFEST}", "this is not a hal bundle, or a part of it is lost"
        )
    text = files.read(MANIFEST)
    try:
        data = json.loads(text)
        version = data["format"]
        if type(version) is not int or version < 1:
            raise TypeError("format is not a positive number")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(
            f"{where}: {MANIFEST} is damaged ({error})", "copy the bundle again or rebuild it"
        ) from error
    if version > FORMAT:
        raise BundleError(
            f"{where} has bundle format {version}; this hal reads up to {FORMAT}",
            "upgrade: pip install -U hal-compiler",
        )
    stated = files.read(MANIFEST_DIGEST).split() if MANIFEST_DIGEST in files else []
    if not stated or stated[0].decode("ascii", "replace") != hashlib.sha256(text).hexdigest():
        raise BundleError(
            f"{where}: {MANIFEST} does not match {MANIFEST_DIGEST}",
            "copy the bundle again or rebuild it",
        )
    try:
        manifest = Manifest.model_validate(data)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(p) for p in first["loc"])
        raise BundleError(
            f"{where}: {MANIFEST}: {place}: {first['msg']}", "rebuild the bundle"
        ) from error
    _check_files(files, manifest)
    return manifest


def _check_files(files: BundleFiles, manifest: Manifest) -> None:
    if GRAPH not in manifest.files:
        raise BundleError(f"{files.root}: {MANIFEST} does not list {GRAPH}", "rebuild the bundle")
    for name, record in manifest.files.items():
        checked_member(name)
        _, _, length = files.locate(name)
        if length != record.size:
            raise BundleError(
                f"{files.root}: {name} has {length} bytes, the manifest says {record.size}",
                "copy the bundle again or rebuild it",
            )
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        results = pool.map(lambda item: _intact(files, *item), manifest.files.items())
        for name, intact in zip(manifest.files, results, strict=True):
            if not intact:
                raise BundleError(
                    f"{files.root}: {name} is damaged (its SHA-256 is not the manifest's)",
                    "copy the bundle again or rebuild it",
                )


def _intact(files: BundleFiles, name: str, record: FileRecord) -> bool:
    """Whether a member has its digest; a large file is not read again until it changes."""
    path, offset, length = files.locate(name)
    memo: Path | None = None
    if length >= _REMEMBER_BYTES:
        stat = path.stat()
        key = (
            str(path.resolve()),
            stat.st_ino,
            stat.st_size,
            stat.st_mtime_ns,
            stat.st_ctime_ns,
            offset,
        )
        digest = hashlib.sha256(repr((key, record.sha256)).encode()).hexdigest()
        with contextlib.suppress(OSError):
            memo = cache_folder("verified") / digest
            if memo.exists():
                return True
    intact = _digest_file(path, offset, length) == record.sha256
    if intact and memo is not None:
        with contextlib.suppress(OSError):
            memo.touch()
    return intact


def digest_path(path: Path) -> FileRecord:
    """Size and SHA-256 of a file."""
    size = path.stat().st_size
    return FileRecord(size=size, sha256=_digest_file(path, 0, size))


def _digest_file(path: Path, offset: int, length: int) -> str:
    digest = hashlib.sha256()
    buffer = bytearray(4 << 20)
    view = memoryview(buffer)
    with path.open("rb") as stream:
        stream.seek(offset)
        while length > 0:
            count = stream.readinto(view[: min(length, len(buffer))])
            if not count:
                break
            digest.update(view[:count])
            length -= count
    return digest.hexdigest()
