"""``hal serve``: how it starts, refuses to, and ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

import hal
from hal.cli import main
from hal.errors import HalError
from hal.runtime.engine import Engine, EngineOptions
from hal.runtime.generate import GenerationOptions
from hal.server import bind, open_model
from tests.cli.conftest import write_model


def serve(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str]]:
    code = main(["serve", *map(str, arguments)])
    return code, capsys.readouterr().err.splitlines()


def test_a_port_in_use_is_told_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with bind("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        code, lines = serve(capsys, "nothing.hal", "--port", port)
    assert code == 2
    assert lines == [
        f"error: port {port} of 127.0.0.1 is in use",
        "hint: choose another with --port, or 0 for any that is free",
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing.hal", "--port", 0], "nothing.hal"),
        (["nothing.hal", "--port", 70000], "'--port'"),
        (["nothing.hal", "--host", "no such host", "--port", 0], "there is no host"),
        (["nothing.hal", "--host", "203.0.113.1", "--port", 0], "cannot be used"),
        (["nothing.hal", "--max-batch", 0], "'--max-batch'"),
    ],
)
def test_wrong_options_are_told_in_two_lines(
    capsys: pytest.CaptureFixture[str], arguments: list[object], words: str
) -> None:
    code, lines = serve(capsys, *arguments)
    assert code == 2
    assert len(lines) == 2
    assert lines[0].startswith("error: ")
    assert words in lines[0]


def test_a_model_without_text_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "plain.hal"
    hal.compile(write_model(tmp_path / "plain.onnx"), target="host:onnxruntime", output=path)
    code, lines = serve(capsys, path, "--port", 0)
    assert code == 2
    assert "gives no embeddings of texts" in lines[0]


def test_without_the_extra_it_says_which(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n == "hal.server" or n.startswith("hal.server.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(hal, "server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, lines = serve(capsys, "nothing.hal")
    assert code == 2
    assert lines == [
        "error: the server needs the optional dependency group 'serve'",
        "hint: pip install 'hal-compiler[serve]'",
    ]


def test_at_sigterm_what_was_taken_is_finished(bundle: Path) -> None:
    command = [sys.executable, "-m", "hal.cli", "serve", str(bundle), "--port", "0", "--json"]
    environment = {**os.environ, "HAL_API_KEY": "secret"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        facts = _first_document(process.stdout)
        assert facts["model"] == "tiny"
        assert facts["target"] == "host:tvm"
        body = {"model": "tiny", "prompt": "A", "max_tokens": 250, "stream": True, "temperature": 0}
        ends: list[str] = []

        def ask(first: threading.Event) -> None:
            headers = {"Authorization": "Bearer secret"}
            place = f"{facts['address']}/v1/completions"
            with httpx.stream("POST", place, json=body, headers=headers, timeout=60) as answer:
                lines = [line for line in _telling(answer.iter_lines(), first) if line]
            last = json.loads(lines[-2].removeprefix("data: "))
            ends.append(last["choices"][0]["finish_reason"] + lines[-1])

        started = [threading.Event() for _ in range(4)]
        threads = [threading.Thread(target=ask, args=(event,)) for event in started]
        for thread in threads:
            thread.start()
        for event in started:
            assert event.wait(30)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert process.wait(30) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert ends == ["lengthdata: [DONE]"] * 4


def _telling(lines: Any, first: threading.Event) -> Any:
    for line in lines:
        yield line
        first.set()


def _first_document(stream: Any) -> Any:
    text = ""
    while not text.rstrip().endswith("}"):
        line = stream.readline()
        assert line, "the server did not start"
        text += line
    return json.loads(text)


# -- builds with another cache ----------------------------------------------------------------


def test_a_build_that_is_contiguous_for_good_is_built_again_with_pages(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other = hal.load(bundle).retarget("host:onnxruntime", kv_cache="contiguous", verify=False)
    options, prompts = GenerationOptions(max_new_tokens=6), ["A class", "The for statement"]
    expected = [other.session().generate(p, max_new_tokens=6).text() for p in prompts]

    def texts(engine: Engine | None) -> list[str]:
        assert engine is not None
        with engine:
            requests = [engine.submit(prompt, options) for prompt in prompts]
            return [request.text() for request in requests]

    model = open_model(other, options=EngineOptions(max_batch=4))
    assert model.session.plan is not None
    assert model.session.plan.layout == "paged"
    assert model.engine is not None
    assert model.engine.max_batch == 4
    assert texts(model.engine) == expected

    def fail(*_: object, **__: object) -> None:
        raise HalError("no compiler here")

    monkeypatch.setattr(type(other), "retarget", fail)
    single = open_model(other, options=EngineOptions(max_batch=4))
    assert single.engine is not None
    assert single.engine.max_batch == 1
    assert "no compiler here" in caplog.text
    assert texts(single.engine) == expected
