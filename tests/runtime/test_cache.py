"""hal.runtime.cache: whole entries or none."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from hal.runtime.cache import entry_writer, publish_file


def test_an_entry_appears_only_when_the_block_ends_well(tmp_path: Path) -> None:
    def fail() -> None:
        with entry_writer(tmp_path / "entry") as folder:
            (folder / "half").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []
    with entry_writer(tmp_path / "entry") as folder:
        (folder / "whole").write_text("whole")
    assert (tmp_path / "entry/whole").read_text() == "whole"


def test_the_second_writer_of_an_entry_loses_in_peace(tmp_path: Path) -> None:
    with entry_writer(tmp_path / "e") as first, entry_writer(tmp_path / "e") as second:
        (first / "f").write_text("same")
        (second / "f").write_text("same")
    assert (tmp_path / "e/f").read_text() == "same"
    assert [p.name for p in tmp_path.iterdir()] == ["e"]


def _publish(folder: Path) -> str:
    return str(publish_file(folder, "lib.so", b"x" * 100_000))


def test_parallel_processes_agree_on_one_file(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        paths = set(pool.map(_publish, [tmp_path] * 16))
    assert len(paths) == 1
    assert Path(paths.pop()).read_bytes() == b"x" * 100_000
