"""Cells, models, the store, and a contender's process, with toy models of hal's own."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from speed.artifacts import Artifact, Artifacts
from speed.cells import Contender, Group, Measure
from speed.contenders import groups
from speed.failures import Unavailable, reason, without_folders
from speed.measure import Bench, Plan, sample
from speed.seats import PLENTY
from speed.shapes import shapes
from speed.store import Store
from speed.venvs import Environments
from speed.worker import Worker
from speed.workers.protocol import foreign_share

import hal
from tests.models import save

DECODE = {"do": "decode", "context": 5, "tokens": 3, "seed": 0}


def quiet(_: str) -> None:
    """Nothing is said."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    config = {"vocab_size": 320, "max_position_embeddings": 64}
    return hal.compile(
        save("llama", folder / "model", **config), target="host:onnxruntime", output=folder / "b"
    ).path


def options(bundle: Path) -> dict[str, Any]:
    return {"artifact": str(bundle), "target": "host:onnxruntime", "threads": 1}


def state(worker: Worker) -> str:
    """The letter by which the system tells whether a process runs or is stopped."""
    return Path(f"/proc/{worker._process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_a_process_answers_commands_and_is_stopped_between_them(bundle: Path) -> None:
    with Worker(Path(sys.executable), "hal_language.py", options(bundle)) as worker:
        assert worker.facts["weights_bytes"] > 0
        assert state(worker) == "T"
        first = worker.ask(DECODE)
        assert state(worker) == "T"
        assert len(first["seconds"]) == len(first["tokens"]) == 3
        worker.ask({"do": "hold", "context": 5, "room": 60, "seed": 0})
        again = worker.ask({"do": "decode", "tokens": 3})
        assert again["tokens"] == first["tokens"]
        assert worker.ask({"do": "prefill", "tokens": 9, "seed": 0})["seconds"][0] > 0
        with pytest.raises(Unavailable, match="ValueError: a language model has no command 'sing'"):
            worker.ask({"do": "sing"})
    assert worker._process.returncode is not None


def test_a_process_that_cannot_load_says_why(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"BundleError: .*nowhere"):
        Worker(Path(sys.executable), "hal_language.py", options(tmp_path / "nowhere"))


@pytest.mark.parametrize("free", [PLENTY, 0])
def test_a_group_is_measured_in_turns_stored_and_not_measured_again(
    bundle: Path, tmp_path: Path, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without memory for all to stay loaded, each is loaded for its turn.
    monkeypatch.setattr("speed.seats.available", lambda: free)
    measure = Measure("decode", "decoding", tuple(DECODE.items()), "tok/s")
    given = (("artifact", str(bundle)), ("target", "host:onnxruntime"))
    toy = Contender("toy", "hal", "hal", "hal_language.py", options=given)
    absent = Contender("absent", "peer", lacking="it is not for this machine")
    group = Group("llm/toy/4-bit", "llm", "a toy", (toy, absent), (measure,))
    environments = Environments(tmp_path / "venvs", quiet)
    artifacts = Artifacts(tmp_path / "models", environments, quiet)
    path = tmp_path / "results" / "speed.json"
    plan = Plan(2, 1, quiet, wait=0.0)
    Bench(plan, environments, artifacts, Store(path, resume=False)).run(group)
    rows = json.loads(path.read_text())["cells"]["llm/toy/4-bit/decode"]["rows"]
    assert [row["name"] for row in rows] == ["toy", "absent"]
    assert len(rows[0]["samples"]) == 2
    assert rows[0]["samples"][0]["value"] > 0
    assert rows[1]["error"] == "it is not for this machine"

    said: list[str] = []
    again = Bench(Plan(2, 1, said.append), environments, artifacts, Store(path, resume=True))
    again.run(group)
    assert said == []


def test_what_cannot_be_made_says_why_and_is_not_tried_twice(tmp_path: Path) -> None:
    said: list[str] = []
    artifacts = Artifacts(tmp_path, Environments(tmp_path, quiet), said.append)
    broken = Artifact("broken", "checkpoint.py", "hal", ("no-such-shape", "{output}"))
    for _ in range(2):
        with pytest.raises(Unavailable, match=r"checkpoint\.py: KeyError: 'no-such-shape'"):
            artifacts.path(broken)
    assert said == ["making broken"]


@pytest.mark.parametrize("quick", [False, True])
def test_every_cell_has_both_routes_and_every_peer(quick: bool) -> None:
    found = groups(quick)
    cells = [group.cell(measure) for group in found for measure in group.measures]
    assert max(Counter(cells).values()) == 1
    for group in found[1:]:
        ours = [c.name for c in group.contenders if c.family == "hal"]
        assert [name.split(",")[0] for name in ours] == ["hal host:tvm", "hal host:onnxruntime"]
        peers = " ".join(c.name for c in group.contenders if c.family == "peer")
        wanted = ["OpenVINO", "PyTorch", "onnxruntime"]
        if group.part == "llm":
            wanted.append("llama.cpp")
        assert all(name in peers for name in wanted), group.key
        assert max(Counter(c.name for c in group.contenders).values()) == 1


def test_one_name_in_the_cache_means_one_way_of_making() -> None:
    made: dict[str, Artifact] = {}
    for group in groups(quick=False):
        for contender in group.contenders:
            for artifact in (contender.artifact, *(a for _, a in contender.files)):
                if artifact is not None:
                    known = made.setdefault(artifact.name, artifact)
                    assert (known.script, known.arguments) == (artifact.script, artifact.arguments)


@pytest.mark.parametrize("name", list(shapes(quick=True)))
def test_weights_that_a_token_reads_are_counted_as_the_model_has_them(name: str) -> None:
    shape = shapes(quick=True)[name]
    config = getattr(transformers, shape.config_class)(**shape.config)
    with torch.device("meta"):
        model = getattr(transformers, shape.model_class)(config)
    counted = 0.0
    for key, weight in model.named_parameters():
        if weight.ndim < 2 or (
            key == "model.embed_tokens.weight" and not config.tie_word_embeddings
        ):
            continue
        share = 1.0
        if ".experts." in key:
            share = config.num_experts_per_tok / config.n_routed_experts
        counted += share * weight.numel()
    assert shape.linear_parameters == counted


def test_a_sample_is_a_rate_or_a_time_and_knows_whether_it_was_disturbed() -> None:
    decode = Measure("decode", "", (), "tok/s")
    found = sample({"seconds": [0.1, 0.3], "foreign": 0.2}, {"do": "decode", "tokens": 2}, decode)
    assert found["value"] == pytest.approx(5.0)
    assert found["spoiled"]
    calls = Measure("batch-1", "", (), "ms")
    found = sample({"seconds": [0.1, 0.3, 0.2], "foreign": 0.0}, {"do": "calls"}, calls)
    assert found == {"value": 200.0, "foreign": 0.0, "spoiled": False}


def test_what_others_took_is_what_was_neither_idle_nor_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sysconf", lambda name: 100)
    assert foreign_share((1000, 500), (1200, 520), own=1.0) == pytest.approx(0.4)
    assert foreign_share((1000, 500), (1200, 600), own=1.5) == 0.0
    assert foreign_share(None, (1, 1), own=0.0) is None


def test_the_reason_is_the_last_error_of_a_log() -> None:
    log = "loading\nTraceback:\n  File x\nValueError: no such op\n\ncleaning up\n"
    assert reason(log) == "ValueError: no such op"
    assert reason("") == "it ended without a message"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Error: /home/me/models/llama/checkpoint is damaged", "Error: checkpoint is damaged"),
        ("128/256 rows, 3 GB/s, see https://example.org/a/b", None),
        ("no file ./here/there", None),
    ],
)
def test_reasons_do_not_say_where_things_lie(text: str, kept: str | None) -> None:
    assert without_folders(text) == (kept or text)
