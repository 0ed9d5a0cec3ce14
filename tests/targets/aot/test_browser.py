"""Pages of real models in headless Chromium give what the host gives."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")

import hal
from hal.conformance import model_cases
from hal.errors import TargetError
from hal.runtime.samples import sample_inputs
from hal.targets import load_backend, resolve
from hal.targets.aot import AotOptions, chromium
from tests.targets.aot.browsing import Site, served

pytestmark = pytest.mark.slow

TARGET, NODE, HOST = "wasm32:browser", "wasm32", "host:onnxruntime"
CASES = {case.name: case for case in model_cases() if case.name != "language-model"}

USER = """<!doctype html>
<iframe id="frame" src="index.html"></iframe>
<script type="module">
  const values = VALUES;
  const pasted = (document) => {
    for (const box of document.querySelectorAll("textarea")) box.value = values[box.name] ?? "";
    document.getElementById("rounds").value = 3;
    document.getElementById("run").click();
  };
  const text = (id) => frame.contentDocument?.getElementById(id)?.textContent;
  const until = async (holds) => {
    while (!holds() && !text("error")) await new Promise((next) => setTimeout(next, 20));
  };
  await until(() => frame.contentDocument?.getElementById("run")?.disabled === false);
  pasted(frame.contentDocument);
  await until(() => text("time"));
  const outputs = [...frame.contentDocument.querySelectorAll("pre")].map(
    (each) => [each.dataset.name, JSON.parse(each.textContent)],
  );
  const found = { outputs: Object.fromEntries(outputs) };
  for (const id of ["name", "size", "time", "error"]) found[id] = text(id);
  await fetch("told", { method: "POST", body: JSON.stringify(found) });
</script>
"""
"""Fills the form of the page as a user does, and tells what it then shows."""

DEVELOPER = """<!doctype html>
<script type="module">
  import { load } from "./hal.js";
  const messages = MESSAGES;
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
  const told = (body) => fetch("told", { method: "POST", body: JSON.stringify(body) });
  try {
    const model = await load("."), all = [];
    for (const message of messages) {
      const feeds = { x: new KIND(bytes(message)) };
      all.push(Array.from((await model.run(feeds)).y));
    }
    await told(all);
  } catch (error) {
    await told(error.message);
  }
</script>
"""
"""Imports the module, and runs one instance on several inputs."""

Browse = Callable[[Path, str], Any]


@pytest.fixture(scope="module")
def browser() -> Path:
    for name in (NODE, TARGET):
        found = resolve(name)
        try:
            load_backend(found.backend).setup(found.descriptor, print)
        except TargetError as error:
            pytest.skip(f"{name} cannot be set up here: {error.message}")
    options = AotOptions.of(found.descriptor)
    return Path(options.run[2].replace("{files}", str(options.environment.files)))


@pytest.fixture
def browse(browser: Path, tmp_path: Path) -> Browse:
    """Open a page's folder with one more HTML file, and wait for what that tells."""

    @contextlib.contextmanager
    def opened(folder: Path, html: str) -> Iterator[Site]:
        (folder / "test.html").write_text(html)
        with served(folder) as site:
            address = f"{site.address}/test.html"
            process = chromium.started(browser, folder, address, tmp_path / "log")
            try:
                yield site
            finally:
                process.kill()
                process.wait()

    def call(folder: Path, html: str) -> Any:
        with opened(folder, html) as site:
            return site.told.get(timeout=120)

    return call


@pytest.fixture(params=CASES)
def built(request: pytest.FixtureRequest, browser: Path, tmp_path: Path) -> hal.Bundle:
    case = CASES[request.param]
    bundle = hal.compile(case.write(tmp_path), target=[TARGET, HOST], **case.options)
    record = bundle.manifest.builds[TARGET]
    assert record.verification is not None
    assert record.verification["passed"]
    bundle.page(tmp_path / "site")
    return bundle


def test_the_form_shows_what_the_host_computes(
    built: hal.Bundle, browse: Browse, tmp_path: Path
) -> None:
    with built.session(HOST) as session:
        x = sample_inputs(session.inputs, seed=3)["x"]
        expected = session.run({"x": x})["y"]
    html = USER.replace("VALUES", json.dumps({"x": json.dumps(x.tolist())}))
    found = browse(tmp_path / "site", html)
    assert found["error"] == ""
    np.testing.assert_allclose(found["outputs"]["y"], expected, atol=1e-4)
    assert found["name"] == built.manifest.name
    assert "weights" in found["size"]
    assert " ms a call, median of 3 rounds" in found["time"]


def test_one_instance_gives_what_the_host_gives_call_after_call(
    built: hal.Bundle, browse: Browse, tmp_path: Path
) -> None:
    with built.session(HOST) as session:
        inputs = [sample_inputs(session.inputs, seed=seed)["x"] for seed in range(5)]
        expected = [session.run({"x": x})["y"] for x in inputs]
    messages = [base64.b64encode(x.tobytes()).decode() for x in inputs]
    kind = {"float32": "Float32Array", "int64": "BigInt64Array"}[inputs[0].dtype.name]
    html = DEVELOPER.replace("MESSAGES", json.dumps(messages)).replace("KIND", kind)
    found = browse(tmp_path / "site", html)
    assert len(found) == len(expected), found
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.reshape(one, other.shape), other, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("[1, 2]", "x: int64 [1, 16] has 16 values, not 2"),
        (json.dumps([[0.5] * 16]), "0.5"),
        (json.dumps([["one"] * 16]), "one"),
        ("[1, 2", "JSON"),
        ("", ""),
    ],
)
def test_the_form_tells_what_is_wrong_with_pasted_values(
    browser: Path, browse: Browse, tmp_path: Path, given: str, words: str
) -> None:
    bundle = hal.compile(CASES["encoder"].write(tmp_path), target=NODE, verify=False)
    bundle.page(tmp_path / "site")
    found = browse(tmp_path / "site", USER.replace("VALUES", json.dumps({"x": given})))
    assert words in found["error"]
    assert bool(found["outputs"]) == (given == "")
