"""A package that ``hal targets new`` writes is one that works."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from hal.errors import InputError
from hal.targets.new_package import ROUTES, write_package


@pytest.mark.parametrize("route", ROUTES)
def test_a_new_package_passes_its_own_tests(route: str, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    written = write_package("my-chip", "Acme & Sons", route, folder)
    assert all(path.is_file() for path in written)
    tomllib.loads((folder / "pyproject.toml").read_text())
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(site), str(folder)], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"],
        capture_output=True, text=True, cwd=folder, check=False,
        env={**os.environ, "PYTHONPATH": str(site)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize(
    ("name", "vendor", "route", "words"),
    [
        ("My Chip", "Acme", "custom", "no name"),
        ("my-chip", " ", "custom", "no vendor"),
        ("my-chip", "Acme", "vulkan", "no route 'vulkan'"),
    ],
)
def test_wrong_words_are_told(
    name: str, vendor: str, route: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words):
        write_package(name, vendor, route, tmp_path / "new")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists already"):
        write_package("my-chip", "Acme", "custom", tmp_path)
