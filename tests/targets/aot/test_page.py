"""A page's files, and its module ``hal.js``, without a browser."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tvm")

from hal.errors import UnsupportedError
from hal.targets.aot.page import write_page
from tests.targets.aot import wasm
from tests.targets.aot.browsing import Site, served


def page_of(folder: Path, program: bytes, record: dict[str, Any] = wasm.RECORD) -> Path:
    """The page of a program whose weights are 1, 2, 3, 4."""
    import numpy as np

    (folder / "program").write_bytes(program)
    (folder / "weights").write_bytes(np.arange(1, 5, dtype=np.float32).tobytes())
    page = folder / "page"
    page.mkdir()
    ranges = {"ids": (0, 512)}
    write_page(page, "sum", record, folder / "program", folder / "weights", ranges)
    return page


def test_the_page_lists_inputs_outputs_and_sizes(tmp_path: Path) -> None:
    record = {
        "inputs": [["x", "FLOAT16", [1, 4]], ["ids", "INT64", [4]], ["on", "BOOL", []]],
        "outputs": [["y", "DOUBLE", [2]]],
    }
    page = page_of(tmp_path, wasm.program(), record)
    assert json.loads((page / "model.json").read_text()) == {
        "format": 1,
        "name": "sum",
        "program": {"file": "model.wasm", "bytes": len(wasm.program())},
        "weights": {"file": "weights.bin", "bytes": 16},
        "inputs": [
            {"name": "x", "dtype": "float16", "shape": [1, 4]},
            {"name": "ids", "dtype": "int64", "shape": [4], "from": 0, "below": 512},
            {"name": "on", "dtype": "bool", "shape": [], "from": 0, "below": 2},
        ],
        "outputs": [{"name": "y", "dtype": "float64", "shape": [2]}],
    }
    assert {p.name for p in page.iterdir()} == {
        "index.html", "hal.js", "model.json", "model.wasm", "weights.bin",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("program", "dtype", "words"),
    [
        (b"\x7fELF", "FLOAT", "no WebAssembly"),
        (b"\0asm\1\0\0\0", "FLOAT", "older hal"),
        (wasm.program(), "BFLOAT16", "'x' is BFLOAT16"),
        (wasm.program(), "FLOAT8E5M2", "'x' is FLOAT8E5M2"),
    ],
)
def test_what_no_browser_runs_is_refused(
    tmp_path: Path, program: bytes, dtype: str, words: str
) -> None:
    record = {"inputs": [["x", dtype, [1, 4]]], "outputs": []}
    with pytest.raises(UnsupportedError, match=words):
        page_of(tmp_path, program, record)


# -- hal.js, in Node --------------------------------------------------------------------------

SCRIPT = """
const { load } = await import(process.argv[2]);
const message = async (work) => { try { await work(); return "none"; } catch (e) { return e.message; } };
const found = await (async (folder) => { %s })(process.argv[3]).catch((e) => e.message);
console.log(JSON.stringify(found));
"""


def run_in_node(site: Site, page: Path, body: str) -> Any:
    """What the body of an asynchronous function returns; it has ``load`` and the page's address."""
    if shutil.which("node") is None:
        pytest.skip("there is no node")
    # Node takes a file of that name for a module; browsers do not look at names.
    module, script = page.parent / "hal.mjs", page.parent / "script.mjs"
    shutil.copyfile(page / "hal.js", module)
    script.write_text(SCRIPT % body)
    done = subprocess.run(
        ["node", script, module, site.address], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_one_instance_runs_many_calls_and_loads_weights_once(tmp_path: Path) -> None:
    page = page_of(tmp_path, wasm.program())
    with served(page) as site:
        found = run_in_node(
            site,
            page,
            """
            const model = await load(folder), all = [];
            for (let i = 0; i < 3; i++) all.push(await model.run({ x: new Float32Array(4).fill(i) }));
            const { median, least, rounds, calls } = await model.time({ x: new Float32Array(4) }, 3);
            return {
              name: model.name, size: model.size, memory: model.memory,
              y: all.map(({ y }) => [y.constructor.name, ...y]),
              timed: 0 < least && least <= median && rounds === 3 && calls >= 1,
            };
            """,
        )
        assert site.requests["/weights.bin"] == 1
    assert found == {
        "name": "sum",
        "size": {"program": len(wasm.program()), "weights": 16},
        "memory": 65536,
        "y": [["Float32Array", *(i + w for w in range(1, 5))] for i in range(3)],
        "timed": True,
    }


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ("{}", "input 'x' is missing: Float32Array of 4"),
        ("{ x: new Float32Array(4), z: 1 }", "there is no input 'z'; there is x"),
        ("{ x: new Float64Array(4) }", "input 'x' is Float64Array of 4, not Float32Array of 4"),
        ("{ x: new Float32Array(5) }", "input 'x' is Float32Array of 5, not Float32Array of 4"),
        ("{ x: new Float32Array(4) }", "none"),
    ],
)
def test_inputs_that_do_not_fit_are_told(tmp_path: Path, feeds: str, message: str) -> None:
    page = page_of(tmp_path, wasm.program())
    with served(page) as site:
        body = f"const m = await load(folder); return message(() => m.run({feeds}));"
        assert run_in_node(site, page, body) == message


def test_a_program_that_fails_says_why_and_is_not_called_again(tmp_path: Path) -> None:
    page = page_of(tmp_path, wasm.program("kernel failed: conv\n"))
    with served(page) as site:
        body = """
        const model = await load(folder), x = new Float32Array(4);
        return [await message(() => model.run({ x })), await message(() => model.run({ x }))];
        """
        first, second = run_in_node(site, page, body)
    assert first == "kernel failed: conv"
    assert second == "the program has failed before: kernel failed: conv"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("weights.bin", bytes(12), "weights.bin has 12 bytes, not 16: it is cut off"),
        ("weights.bin", bytes(20), "weights.bin has more than 16 bytes"),
        ("weights.bin", None, "/weights.bin: 404 File not found"),
        ("model.json", b'{"format": 2}', "model.json has format 2, not 1"),
    ],
)
def test_a_damaged_page_is_told(
    tmp_path: Path, file: str, content: bytes | None, message: str
) -> None:
    page = page_of(tmp_path, wasm.program())
    if content is None:
        (page / file).unlink()
    else:
        (page / file).write_bytes(content)
    with served(page) as site:
        assert run_in_node(site, page, "await load(folder);") == message
