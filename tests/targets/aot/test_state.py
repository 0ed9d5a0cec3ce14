"""Programs without a runtime that carry a cache in their own memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm")
pytest.importorskip("transformers")

from hal.targets.aot.backend import AotExecutable
from hal.targets.aot.pools import KeptPool
from tests.language_model import DIMS, PROMPT, bundle, expected, fixed, tokens

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


@pytest.mark.parametrize(
    ("chunk", "cache"), [(1, None), (4, None), (1, "int8"), (4, "int4")], ids=str
)
def test_greedy_tokens_are_those_of_the_host(
    chunk: int, cache: str | None, tmp_path: Path
) -> None:  # fmt: skip
    target = fixed(tmp_path, "c")
    built = bundle().retarget(target, dims={**DIMS, "sequence": chunk}, kv_cache=cache)
    record = next(iter(built.manifest.builds.values()))
    assert record.placement["assigned"] == {"aot": record.placement["nodes"]}
    other = bundle().retarget("host:tvm", kv_cache=cache or "contiguous")
    with built.session() as session, other.session() as reference:
        wanted = tokens(reference)
        assert tokens(session) == wanted
        assert tokens(session) == wanted
    if cache is None:
        assert tuple(wanted) == expected()


def test_states_of_fixed_size_go_in_and_out(tmp_path: Path) -> None:
    built = bundle("qwen3_next").retarget(fixed(tmp_path, "c"), dims=DIMS)
    with built.session() as session:
        assert tuple(tokens(session)) == expected("qwen3_next")


def test_a_step_sends_and_receives_no_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = bundle("llama").retarget(fixed(tmp_path, "c"), dims=DIMS)
    record = next(iter(built.manifest.builds.values())).segments[0]["record"]
    assert {name for name, _, _ in record["kept"]} == {pool["input"] for pool in record["pools"]}
    assert not {name for name, _, _ in record["inputs"]} & {n for n, _, _ in record["kept"]}
    sent: list[bool] = []
    run = AotExecutable.run

    def watched(self: AotExecutable, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        sent.append(any(self._known.get(n) is not inputs[n] for n, _, _ in self._kept))
        return run(self, inputs)

    monkeypatch.setattr(AotExecutable, "run", watched)
    with built.session() as session:
        tokens(session)
    assert sent == [True] + [False] * (len(sent) - 1)


def test_what_changes_the_state_from_outside_reaches_the_program(tmp_path: Path) -> None:
    built = bundle("llama").retarget(fixed(tmp_path, "c"), dims=DIMS)
    ids = np.array([PROMPT], np.int64)
    with built.session() as one, bundle("llama").session() as other:
        whole = other.run({"input_ids": ids})["logits"]
        one.run({"input_ids": ids[:, ::-1].copy()})
        other.trim(5)
        one.import_state(other.export_state())  # loaded: the program's own memory is outdated
        np.testing.assert_allclose(
            one.run({"input_ids": ids[:, 5:7]})["logits"], whole[:, 5:7], atol=1e-4
        )
        twin = one.fork()  # two states take turns in one program
        for at in (7, 8):
            for session in (one, twin):
                logits = session.run({"input_ids": ids[:, at : at + 1]})["logits"]
                np.testing.assert_allclose(logits, whole[:, at : at + 1], atol=1e-4)
        # What the program wrote can be read from outside.
        one.trim(6)
        np.testing.assert_allclose(
            one.run({"input_ids": ids[:, 6:]})["logits"], whole[:, 6:], atol=1e-4
        )
        exported, right = one.export_arrays(), None
        other.reset()
        other.run({"input_ids": ids})
        right = other.export_arrays()
        for name, array in exported.items():
            np.testing.assert_allclose(array, right[name], atol=1e-5)


def test_new_positions_go_where_table_and_lengths_say() -> None:
    pool = np.zeros((3, 2, 4, 5), np.float32)
    update = np.random.default_rng(0).standard_normal((2, 2, 3, 5)).astype(np.float32)
    inputs = {"t": np.array([[2, 0], [1, 1]], np.int32), "n": np.array([3, 0], np.int64)}
    KeptPool("p", "q", "u", "t", "n").write(pool, update, inputs)
    np.testing.assert_array_equal(pool[2, :, 3], update[0, :, 0])
    np.testing.assert_array_equal(pool[0, :, :2], update[0, :, 1:])
    np.testing.assert_array_equal(pool[1, :, :3], update[1])
    assert np.count_nonzero(pool) == update.size
