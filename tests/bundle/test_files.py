"""hal.bundle.files: directories and zips read alike, and nothing leaves the bundle."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from hal.bundle.files import ALIGNMENT, BundleFiles, checked_member, pack, unpack
from hal.errors import BundleError

MEMBERS = {"manifest.json": b"{}", "builds/a/lib.so": b"x" * 5000, "empty": b""}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "bundle"
    for name, data in MEMBERS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def test_a_packed_bundle_reads_like_its_folder(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "b.hal")
    files = BundleFiles.open(tmp_path / "b.hal")
    assert {n: files.read(n) for n in files.names()} == MEMBERS
    assert files.extracted("builds/a/lib.so").read_bytes() == MEMBERS["builds/a/lib.so"]
    unpack(files, tmp_path / "again")
    assert (tmp_path / "again/builds/a/lib.so").read_bytes() == MEMBERS["builds/a/lib.so"]


def test_members_of_a_zip_are_aligned_and_any_unzip_reads_them(
    folder: Path, tmp_path: Path
) -> None:
    pack(folder, tmp_path / "b.hal")
    files = BundleFiles.open(tmp_path / "b.hal")
    assert all(files.locate(n)[1] % ALIGNMENT == 0 for n in files.names())
    with zipfile.ZipFile(tmp_path / "b.hal") as archive:
        assert archive.testzip() is None


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "", "a//b", "a\\b"])
def test_names_that_leave_the_bundle_are_refused(name: str) -> None:
    with pytest.raises(BundleError, match="outside itself"):
        checked_member(name)


def test_a_link_out_of_the_bundle_is_refused(folder: Path) -> None:
    (folder / "weights.safetensors").symlink_to("/etc/hostname")
    with pytest.raises(BundleError, match="link that leaves"):
        BundleFiles.open(folder)


def test_compressed_members_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "b.hal", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("manifest.json", "{}" * 1000)
    with pytest.raises(BundleError, match="compressed"):
        BundleFiles.open(tmp_path / "b.hal")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + b"\0" * 40])
def test_a_file_that_is_no_zip_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "b.hal").write_bytes(content)
    with pytest.raises(BundleError, match="not a bundle"):
        BundleFiles.open(tmp_path / "b.hal")


def test_a_missing_path_says_so(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle at"):
        BundleFiles.open(tmp_path / "nothing.hal")
