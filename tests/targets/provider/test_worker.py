"""A worker answers, says what is wrong, and may die or hang without harm."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from hal.errors import TargetError
from hal.targets.provider import wire, worker
from hal.targets.provider.worker import Worker

SCRIPT = """
import os, signal, sys, time
sys.path.insert(0, {folder!r})
import wire
answers = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)
while (message := wire.receive(sys.stdin.buffer)) is not None:
    head, arrays = message
    if head["do"] == "echo":
        print("noise on stdout", flush=True)
        wire.send(answers, {{"variable": os.environ.get("VENDOR", "")}}, arrays)
    elif head["do"] == "refuse":
        wire.send(answers, {{"error": "RuntimeError: no such op\\nand more"}}, {{}})
    elif head["do"] == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif head["do"] == "leave":
        print("the vendor's last words", file=sys.stderr, flush=True)
        sys.exit(3)
    else:
        time.sleep(60)
"""

Start = Callable[..., Worker]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    script = tmp_path / "serve.py"
    script.write_text(SCRIPT.format(folder=str(Path(wire.__file__).parent)))
    monkeypatch.setattr(worker, "SCRIPT", script)
    started = []

    def make(**variables: str) -> Worker:
        started.append(Worker(Path(sys.executable), "chip", variables))
        return started[-1]

    yield make
    for each in started:
        each.close()


def test_messages_survive_the_wire() -> None:
    arrays = {
        "a": np.arange(6, dtype=np.int8).reshape(2, 3),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 4)),
        "turned": np.arange(6).reshape(2, 3).T,
    }
    stream = io.BytesIO()
    wire.send(stream, {"do": "x", "n": 1}, arrays)
    stream.seek(0)
    received = wire.receive(stream)
    assert received is not None
    head, found = received
    assert head == {"do": "x", "n": 1}
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
    assert wire.receive(stream) is None


def test_a_message_that_is_cut_off_is_no_message() -> None:
    stream = io.BytesIO()
    wire.send(stream, {}, {"a": np.ones(100)})
    assert wire.receive(io.BytesIO(stream.getvalue()[:-1])) is None
    assert wire.receive(io.BytesIO(stream.getvalue()[:10])) is None


def test_a_worker_answers_whatever_its_libraries_print(start: Start) -> None:
    with start(VENDOR="yes") as chip:
        for n in (1, 1000):
            told, arrays = chip.ask({"do": "echo"}, {"x": np.arange(n)}, limit=30)
            assert told == {"variable": "yes"}
            np.testing.assert_array_equal(arrays["x"], np.arange(n))


def test_what_the_vendor_refuses_is_told_in_one_line(start: Start) -> None:
    with start() as chip:
        with pytest.raises(
            TargetError, match=r"^chip failed at 'refuse': RuntimeError: no such op$"
        ):
            chip.ask({"do": "refuse"}, limit=30)
        assert chip.ask({"do": "echo"}, limit=30)[0] == {"variable": ""}


@pytest.mark.parametrize(
    ("request_", "words"),
    [("crash", "signal SIGSEGV"), ("leave", "the vendor's last words")],
)
def test_a_worker_that_dies_is_told(start: Start, request_: str, words: str) -> None:
    with start() as chip:
        with pytest.raises(TargetError, match=rf"died during '{request_}': .*{words}"):
            chip.ask({"do": request_}, limit=30)
        with pytest.raises(TargetError, match="died"):
            chip.ask({"do": "echo"}, limit=30)


def test_a_worker_that_hangs_is_ended(start: Start) -> None:
    begin = time.monotonic()
    with start() as chip, pytest.raises(TargetError, match=r"did not finish 'sleep' in 0.5 s"):
        chip.ask({"do": "sleep"}, limit=0.5)
    assert time.monotonic() - begin < 30


def test_an_interpreter_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="cannot start") as caught:
        Worker(tmp_path / "python", "chip")
    assert caught.value.hint == "hal targets setup chip"


def test_native_code_that_hangs_ends_without_anybody_to_end_it(tmp_path: Path) -> None:
    script = tmp_path / "serve.py"
    folder = str(Path(wire.__file__).parent)
    script.write_text(
        f"import sys\nsys.path.insert(0, {folder!r})\n"
        "import ctypes, serving\nserving._GRACE = 0\n"
        "class Server:\n"
        "    def quick(self, head, arrays):\n        return {'head': sorted(head)}\n"
        "    def hang(self, head, arrays):\n"
        "        ctypes.PyDLL(None).sleep(60)\n"  # with the interpreter's lock, as vendors' code does
        "serving.serve(Server)\n"
    )
    with subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        wire.send(process.stdin, {"do": "quick", "seconds": 1}, {})
        assert wire.receive(process.stdout) == ({"head": ["do"]}, {})
        time.sleep(1.5)  # a limit holds for its own request only
        wire.send(process.stdin, {"do": "hang", "seconds": 1}, {})
        assert process.wait(30) == -signal.SIGALRM
