"""Logits of each row's last token: the same as among those of all tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hal
from hal.bundle.manifest import BuildRecord
from hal.passes.base import Outcome
from hal.passes.pick_positions import PickPositions
from hal.runtime.picks import last_of, picked
from tests import files, models

ROUTES = ["host:onnxruntime", "host:tvm"]
IDS = np.random.default_rng(0).integers(3, 256, (3, 6))
LENGTHS = [6, 2, 4]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> hal.Bundle:
    source = models.save("llama", tmp_path_factory.mktemp("source"), num_hidden_layers=1)
    return hal.compile(source, target=ROUTES)


@pytest.mark.parametrize("route", ROUTES)
def test_the_last_logits_are_those_among_all(bundle: hal.Bundle, route: str) -> None:
    assert bundle.manifest.builds[route].picks
    with bundle.session(route) as session:
        every = session.run({"input_ids": IDS})["logits"]
        session.reset()
        last = session.run({"input_ids": IDS}, logits="last")["logits"]
        assert every.shape == (3, 6, 256)
        np.testing.assert_allclose(last, every[:, -1:], atol=1e-5)
        assert session.position == 6


@pytest.mark.parametrize("route", ROUTES)
def test_the_last_token_of_a_padded_row_is_its_last_that_counts(
    bundle: hal.Bundle, route: str
) -> None:
    more = IDS[:, :2]
    with bundle.session(route) as session:
        every = session.run({"input_ids": IDS}, lengths=LENGTHS)["logits"]
        after = session.run({"input_ids": more}, lengths=[0, 1, 2])["logits"]
        session.reset()
        last = session.run({"input_ids": IDS}, lengths=LENGTHS, logits="last")["logits"]
        np.testing.assert_allclose(last, last_of(every, LENGTHS), atol=1e-5)
        last = session.run({"input_ids": more}, lengths=[0, 1, 2], logits="last")["logits"]
        assert session.lengths == [6, 3, 6]
        np.testing.assert_allclose(last[1:], last_of(after, [0, 1, 2])[1:], atol=1e-5)


@pytest.mark.parametrize("route", ROUTES)
def test_a_step_of_some_rows_gives_their_last_logits(bundle: hal.Bundle, route: str) -> None:
    with bundle.session(route) as session:
        every = session.run({"input_ids": IDS[:2]}, lengths=LENGTHS[:2])["logits"]
        session.reset()
        rows = [session.state.add() for _ in range(2)]
        last = session.step(rows, IDS[:2], LENGTHS[:2], logits="last")
        np.testing.assert_allclose(last, last_of(every, LENGTHS[:2]), atol=1e-5)


def test_a_build_that_computes_all_is_cut_afterwards(
    bundle: hal.Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PickPositions, "run", lambda *_: Outcome(0))
    plain = bundle.retarget(ROUTES[0], verify=False)
    assert not plain.manifest.builds[ROUTES[0]].picks
    results = []
    for each in (plain, bundle):
        with each.session(ROUTES[0]) as session:
            results.append(session.run({"input_ids": IDS}, lengths=LENGTHS, logits="last"))
    assert results[0]["logits"].shape == (3, 1, 256)
    np.testing.assert_allclose(results[0]["logits"], results[1]["logits"], atol=1e-5)


def test_records_from_before_say_nothing_and_load(bundle: hal.Bundle) -> None:
    data = bundle.manifest.builds[ROUTES[0]].model_dump()
    del data["picks"]
    assert BuildRecord.model_validate(data).picks is False


def test_an_unknown_choice_is_refused_before_the_state_moves(bundle: hal.Bundle) -> None:
    wrong: Any = "first"
    with bundle.session(ROUTES[0]) as session:
        with pytest.raises(hal.InputError, match="logits='first' is unknown"):
            session.run({"input_ids": IDS}, logits=wrong)
        assert session.position == 0


def test_a_model_without_logits_has_no_last_ones(tmp_path: Path) -> None:
    plain = hal.compile(files.save_mlp(tmp_path / "mlp.onnx"), target=ROUTES[0])
    with plain.session() as session, pytest.raises(hal.InputError, match="no language model"):
        session.run({"x": np.zeros((2, files.HIDDEN), np.float32)}, logits="last")


def test_a_row_without_tokens_takes_its_first_position() -> None:
    assert picked([3, 0], 3, "last").tolist() == [[2], [0]]
    assert picked([3, 0], 3, "all").tolist() == [[0, 1, 2], [0, 1, 2]]
    with pytest.raises(hal.InputError, match="have no positions"):
        last_of(np.zeros((2, 9)), [1, 1])
