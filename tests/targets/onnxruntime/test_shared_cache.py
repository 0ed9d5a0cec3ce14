from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hal import InputError
from hal.ir import Graph, State
from hal.ir.evaluate import evaluate
from hal.targets.onnxruntime.legalize import legalize
from hal.targets.onnxruntime.session import OnnxRuntimeExecutable
from hal.targets.onnxruntime.shared_cache import share_cache
from tests.targets.onnxruntime.support import executable, parse

SIGNATURE = """g (float[batch, 4, sequence, 8] q, float[batch, 2, sequence, 8] k,
    float[batch, 2, sequence, 8] v, float[batch, 2, past, 8] pk, float[batch, 2, past, 8] pv)
    => (float[batch, 4, sequence, 8] y, int64[1] position, float[batch, 2, total, 8] nk,
    float[batch, 2, total, 8] nv)"""
IN_THE_OP = """{ position = Shape <start = 2, end = 3> (pk)
    y, nk, nv = Attention <is_causal = 1, scale = 0.4> (q, k, v, , pk, pv) }"""
BEFORE_THE_OP = """{ position = Shape <start = 2, end = 3> (pk)
    nk = Concat <axis = 2> (pk, k) nv = Concat <axis = 2> (pv, v)
    y = Attention <is_causal = 1, scale = 0.4> (q, nk, nv) }"""
NOT_CAUSAL = """{ position = Shape <start = 2, end = 3> (pk)
    y, nk, nv = Attention <scale = 0.4> (q, k, v, , pk, pv) }"""

AXES = ("batch", "head", "position", "channel")
STATE = (State("key", "pk", "nk", "key", AXES, 2), State("value", "pv", "nv", "value", AXES, 2))


def graph(body: str = IN_THE_OP) -> Graph:
    made = parse(SIGNATURE + body)
    made.state = STATE
    return made


def tokens(batch: int, count: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    heads = {"q": 4, "k": 2, "v": 2}
    return {n: rng.standard_normal((batch, h, count, 8), np.float32) for n, h in heads.items()}


def steps(of: Graph, run: OnnxRuntimeExecutable, batch: int, counts: list[int]) -> Any:
    """Compare a sequence of calls with the reference; returns the store."""
    store = run.create_state(STATE)
    assert store is not None
    past = {n: np.zeros((batch, 2, 0, 8), np.float32) for n in ("pk", "pv")}
    for seed, count in enumerate(counts):
        given = tokens(batch, count, seed)
        expected = evaluate(of, {**given, **past})
        actual = run.step(given, store)
        assert set(actual) == {"y", "position"}
        assert np.allclose(actual["y"], expected["y"], atol=2e-6)
        assert actual["position"] == expected["position"]
        past = {"pk": expected["nk"], "pv": expected["nv"]}
        assert np.array_equal(store.export_array("key"), expected["nk"])
        assert np.array_equal(store.export_array("value"), expected["nv"])
    return store


@pytest.mark.parametrize("batch", [1, 2])
def test_prefill_chunks_and_decoding_equal_the_reference(tmp_path: Path, batch: int) -> None:
    made = graph()
    steps(made, executable(made, tmp_path), batch, [5, 1, 1, 4, 1])


def test_the_cache_grows_past_its_first_buffer(tmp_path: Path) -> None:
    made = graph()
    steps(made, executable(made, tmp_path), 1, [250, 5, 1, 1, 600, 1])


def test_a_step_writes_into_the_same_memory(tmp_path: Path) -> None:
    made = graph()
    run = executable(made, tmp_path)
    store: Any = steps(made, run, 1, [3, 1])
    before = store._values["key"].data_ptr()
    run.step(tokens(1, 1), store)
    assert store._values["key"].data_ptr() == before


def test_state_may_be_passed_as_arrays(tmp_path: Path) -> None:
    made = graph()
    given = tokens(2, 3)
    rng = np.random.default_rng(9)
    for name in ("pk", "pv"):
        given[name] = rng.standard_normal((2, 2, 6, 8), np.float32)
    expected = evaluate(made, given)
    actual = executable(made, tmp_path).run(given)
    for name, right in expected.items():
        assert np.allclose(actual[name], right, atol=2e-6)


def test_reset_allows_another_batch_size(tmp_path: Path) -> None:
    made = graph()
    run = executable(made, tmp_path)
    store = steps(made, run, 2, [4])
    with pytest.raises(InputError, match="the batch is 1"):
        run.step(tokens(1, 1), store)
    store.reset()
    assert run.step(tokens(1, 2), store)["y"].shape == (1, 4, 2, 8)


@pytest.mark.parametrize("body", [NOT_CAUSAL, BEFORE_THE_OP])
def test_attention_of_another_meaning_keeps_its_own_op(tmp_path: Path, body: str) -> None:
    made = graph(body)
    assert share_cache(legalize(made)) is None
    steps(made, executable(made, tmp_path), 1, [3, 2, 1])


def test_an_imported_cache_is_continued(tmp_path: Path) -> None:
    made = graph()
    run = executable(made, tmp_path)
    first = tokens(1, 6)
    empty = {n: np.zeros((1, 2, 0, 8), np.float32) for n in ("pk", "pv")}
    before = evaluate(made, {**first, **empty})
    store = run.create_state(STATE)
    assert store is not None
    store.import_array("key", before["nk"])
    store.import_array("value", before["nv"])
    given = tokens(1, 1, 5)
    expected = evaluate(made, {**given, "pk": before["nk"], "pv": before["nv"]})
    assert np.allclose(run.step(given, store)["y"], expected["y"], atol=2e-6)
