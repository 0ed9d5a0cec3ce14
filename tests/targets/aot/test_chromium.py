"""The worker that hands messages to a page, with a browser of a few lines of Python."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm")

from hal.errors import TargetError
from hal.targets.aot import chromium
from hal.targets.process import Supervised
from tests.targets.aot import wasm
from tests.targets.aot.test_page import page_of

BROWSER = f"""#!{sys.executable}
import sys, urllib.request
address = sys.argv[-1].removesuffix("drive.html")
def asked(path, data=None):
    with urllib.request.urlopen(address + path, data, timeout=20) as answer:
        return answer.read()
assert b"hal.js" in asked("drive.html") and b'"sum"' in asked("model.json")
while True:
    message = asked("next")
    BODY
"""
ECHO = 'asked("done", message)'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A page, and where a browser would be unpacked."""
    (tmp_path / "usr" / "lib" / "chromium").mkdir(parents=True)
    page_of(tmp_path, wasm.program())
    return tmp_path


def worker(folder: Path, body: str) -> Supervised:
    browser = folder / "usr" / "lib" / "chromium" / "browser"
    browser.write_text(BROWSER.replace("BODY", body))
    browser.chmod(0o755)
    assert chromium.__file__
    return Supervised([sys.executable, chromium.__file__, str(browser), str(folder / "page")], "it")


def asked(process: Supervised, array: np.ndarray, seconds: float = 30) -> np.ndarray:
    def talk(stdin, stdout):  # type: ignore[no-untyped-def]
        stdin.write(array.tobytes())
        stdin.flush()
        received = stdout.read(16)
        return np.frombuffer(received, np.float32) if len(received) == 16 else None

    found: np.ndarray = process.exchange("run", seconds, talk)
    return found


def test_messages_go_to_the_page_and_back_in_order(folder: Path) -> None:
    with worker(folder, ECHO) as process:
        for i in range(3):
            x = np.full(4, i, np.float32)
            assert asked(process, x).tolist() == x.tolist()
    assert not list(running(folder))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('asked("failed", b"no SIMD here")', "died during 'run': no SIMD here"),
        ('asked("done", b"12")', "died during 'run': 12"),
        ('sys.exit("out of memory")', "died during 'run': the browser ended: out of memory"),
        ('urllib.request.urlopen(address[:-9] + "/model.json")', "HTTP Error 404"),
        ("import time; time.sleep(60)", "did not finish 'run' in 2 s"),
    ],
)
def test_what_goes_wrong_in_the_browser_is_told(folder: Path, body: str, words: str) -> None:
    with worker(folder, body) as process, pytest.raises(TargetError, match=words):
        asked(process, np.zeros(4, np.float32), 2 if "sleep" in body else 30)
    assert not list(running(folder))


def running(folder: Path) -> Iterator[str]:
    """Processes that were started from the folder and are left."""
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    yield from (line for line in listed.stdout.splitlines() if str(folder / "usr") in line)
