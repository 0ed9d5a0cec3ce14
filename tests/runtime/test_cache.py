"""hal.runtime.cache: whole entries or none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hal.runtime.cache import entry_writer


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


PUBLISH = """
import sys
from pathlib import Path
from hal.runtime.cache import publish_file

for _ in range(20):
    print(publish_file(Path(sys.argv[1]), "lib.so", b"x" * 100_000))
"""


def test_parallel_processes_agree_on_one_file(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PUBLISH, str(tmp_path)]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    printed = [line for writer in writers for line in writer.communicate(timeout=60)[0].split()]
    assert len(printed) == 80
    assert len(set(printed)) == 1
    assert Path(printed[0]).read_bytes() == b"x" * 100_000
