"""A conversation as a file: what moves, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hal
from hal import InputError
from hal.runtime.saved_state import SavedState
from tests import models
from tests.compiler.support import ROUTE

IDS = np.array([[5, 9, 7, 3, 8]])
NEXT = np.array([[4]])

Compiled = tuple[torch.nn.Module, hal.Bundle]


def said(bundle: hal.Bundle) -> hal.Session:
    session = bundle.session()
    session.run({"input_ids": IDS})
    return session


def test_a_saved_state_goes_on_where_it_was(language_model: Compiled, tmp_path: Path) -> None:
    _, bundle = language_model
    first = said(bundle)
    first.export_state(IDS.tolist()).save(tmp_path / "state")
    second = bundle.session()
    state = second.import_state(tmp_path / "state")
    assert state.token_ids == (tuple(IDS[0].tolist()),)
    assert second.position == IDS.shape[1]
    step = {"input_ids": NEXT}
    np.testing.assert_array_equal(second.run(step)["logits"], first.run(step)["logits"])


@pytest.mark.parametrize("kv_cache", ["paged", "int8", "paged,int4"])
def test_a_state_moves_to_another_layout(language_model: Compiled, kv_cache: str) -> None:
    _, bundle = language_model
    first = said(bundle)
    state = first.export_state()
    second = bundle.retarget(ROUTE, kv_cache=kv_cache, verify=False).session()
    second.import_state(state)
    step = {"input_ids": NEXT}
    near = 0.05 if "int" in kv_cache else 1e-5
    np.testing.assert_allclose(second.run(step)["logits"], first.run(step)["logits"], atol=near)


def test_rows_keep_their_lengths(language_model: Compiled) -> None:
    _, bundle = language_model
    first = bundle.session()
    first.run({"input_ids": np.repeat(IDS, 2, axis=0)}, lengths=[5, 2])
    second = bundle.session()
    second.import_state(first.export_state())
    assert second.lengths == [5, 2]
    with pytest.raises(InputError, match=r"\[5, 2\] tokens"):
        second.export_arrays()


def test_a_state_of_another_model_is_refused(language_model: Compiled, memory: hal.Bundle) -> None:
    _, bundle = language_model
    session = memory.session()
    with pytest.raises(InputError, match="belongs to another model"):
        session.import_state(said(bundle).export_state())


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"tokens": (999,)}, id="more than positions"),
        pytest.param({"tokens": (-3,)}, id="less than none"),
        pytest.param({"tokens": (4,)}, id="other than arrays hold"),
        pytest.param({"first": {"0/0.key": 1, "0/0.value": 0}}, id="another start"),
        pytest.param({"arrays": {}}, id="nothing"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(
    language_model: Compiled, change: dict[str, Any]
) -> None:
    _, bundle = language_model
    session = said(bundle)
    state = dataclasses.replace(session.export_state(), **change)
    with pytest.raises(InputError, match="row 0"):
        session.import_state(state)
    assert session.position == IDS.shape[1]


@pytest.mark.parametrize("value", [None, 5, {}, b"", "", []])
def test_what_is_no_state_is_refused(language_model: Compiled, value: Any) -> None:
    session = language_model[1].session()
    with pytest.raises(InputError):
        session.import_state(value)
    with pytest.raises(InputError):
        SavedState.load(value)


@pytest.mark.parametrize("length", [1.5, "2", None, [1], True, -1, 6])
def test_a_session_is_trimmed_to_whole_lengths_only(language_model: Compiled, length: Any) -> None:
    session = said(language_model[1])
    with pytest.raises(InputError):
        session.trim(length)
    assert session.position == IDS.shape[1]
    session.reset()
    with pytest.raises(InputError):
        session.trim(5)


@pytest.mark.parametrize("lengths", [3, "ab", [[3]], [1.5], ["3"], [True], [], [6], [-1], [1, 1]])
def test_lengths_that_are_none_are_refused(language_model: Compiled, lengths: Any) -> None:
    session = language_model[1].session()
    with pytest.raises(InputError, match="length"):
        session.run({"input_ids": IDS}, lengths=lengths)


@pytest.mark.parametrize("shape", [(0, 3), (1, 0)])
def test_nothing_to_run_is_refused(language_model: Compiled, shape: tuple[int, int]) -> None:
    session = language_model[1].session()
    with pytest.raises(InputError, match="empty"):
        session.run({"input_ids": np.zeros(shape, np.int64)})


def test_a_model_compiled_again_takes_the_state(language_model: Compiled, tmp_path: Path) -> None:
    _, bundle = language_model
    folder = models.save("llama", tmp_path, num_hidden_layers=1)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    again = hal.compile(folder, target=ROUTE, kv_cache="expanded,paged", verify=False)
    assert again.session().model_digest == bundle.session().model_digest
    changed = models.save("llama", tmp_path / "other", num_hidden_layers=1, head_dim=8)
    other = hal.compile(changed, target=ROUTE, verify=False)
    assert other.session().model_digest != bundle.session().model_digest


def test_ids_that_do_not_fit_are_refused(language_model: Compiled) -> None:
    _, bundle = language_model
    with pytest.raises(InputError, match=r"\[2\] token ids are given"):
        said(bundle).export_state([[1, 2]])


@pytest.fixture
def saved(language_model: Compiled, tmp_path: Path) -> Path:
    said(language_model[1]).export_state().save(tmp_path / "state")
    return tmp_path / "state"


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def other_header(data: bytes, change: tuple[str, object]) -> bytes:
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    facts = json.loads(header["__metadata__"]["hal.state"])
    facts[change[0]] = change[1]
    header["__metadata__"]["hal.state"] = json.dumps(facts)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[: len(data) // 2], id="cut off"),
        pytest.param(lambda data: flip(data, len(data) - 5), id="a value"),
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: b"not a state at all", id="another file"),
        pytest.param(lambda data: other_header(data, ("tokens", [4])), id="the length"),
        pytest.param(lambda data: other_header(data, ("model", "0" * 64)), id="the model"),
        pytest.param(lambda data: other_header(data, ("format", 99)), id="a newer format"),
        pytest.param(lambda data: other_header(data, ("first", None)), id="a missing fact"),
    ],
)
def test_a_damaged_file_is_refused(saved: Path, damage: object) -> None:
    assert callable(damage)
    saved.write_bytes(damage(saved.read_bytes()))
    with pytest.raises(InputError, match="state"):
        SavedState.load(saved)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no state file .*nowhere"):
        SavedState.load(tmp_path / "nowhere")


def test_nothing_is_left_of_a_state_that_cannot_be_written(saved: Path, tmp_path: Path) -> None:
    state = SavedState.load(saved)
    with pytest.raises(InputError, match="cannot be written"):
        state.save(tmp_path / "no" / "folder" / "state")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state"]


@pytest.mark.parametrize("layout", ["contiguous", "paged"])
def test_forks_go_their_own_ways(language_model: Compiled, layout: str) -> None:
    _, bundle = language_model
    if layout == "paged":
        bundle = bundle.retarget(ROUTE, kv_cache="paged", verify=False)
    first = said(bundle)
    second = first.fork()
    third = second.fork()
    straight = said(bundle)
    first.run({"input_ids": np.array([[11, 12, 13]])})
    second.run({"input_ids": np.array([[20]])})
    for session in (third, straight):
        session.run({"input_ids": NEXT})
    second.trim(IDS.shape[1])
    step = {"input_ids": NEXT}
    right = said(bundle).run(step)["logits"]
    np.testing.assert_allclose(second.run(step)["logits"], right, atol=1e-5)
    np.testing.assert_allclose(third.run(step)["logits"], straight.run(step)["logits"], atol=1e-5)
    first.reset()
    third.run(step)
    assert (first.position, third.position) == (0, 8)


@pytest.mark.parametrize(
    "use",
    [
        lambda session: session.run({"input_ids": NEXT}),
        lambda session: session.export_state(),
        lambda session: session.export_arrays(),
        lambda session: session.import_state("nowhere"),
        lambda session: session.fork(),
        lambda session: session.trim(1),
        lambda session: session.reset(),
    ],
)
def test_a_closed_session_says_so(language_model: Compiled, use: Callable[[Any], Any]) -> None:
    _, bundle = language_model
    session = said(bundle)
    session.close()
    with pytest.raises(hal.TargetError, match="the session is closed"):
        use(session)
