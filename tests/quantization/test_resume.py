"""Folders of unfinished work."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from hal.quantization import resumable


def test_a_folder_stays_after_an_exception_and_goes_after_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HAL_CACHE", str(tmp_path))
    work = resumable("m", "data.npy", "w4a16")
    folder = work.__enter__()
    assert folder is not None
    folder.mkdir()
    (folder / "layer").write_text("done")
    assert not work.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)  # it goes on
    with resumable("m", "data.npy", "w3a16") as other:
        assert other != folder
    with resumable("m", "data.npy", "w4a16") as again:
        assert again == folder
        assert (folder / "layer").exists()
    assert not folder.exists()


def test_old_work_is_swept_and_objects_have_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HAL_CACHE", str(tmp_path))
    old = tmp_path / "unfinished" / "old"
    old.mkdir(parents=True)
    os.utime(old, (time.time() - 8 * 86400,) * 2)
    with resumable("m", "data.npy", "w4a16"):
        assert not old.exists()
    with resumable(object(), "data.npy", "w4a16") as folder:
        assert folder is None
