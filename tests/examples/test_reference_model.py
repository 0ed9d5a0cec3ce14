"""The reference model: its text is split cleanly, and its training can be stopped and go on."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from tests.examples.conftest import Load


@pytest.fixture(scope="module")
def text(load: Load) -> ModuleType:
    return load("reference_text")


@pytest.fixture(scope="module")
def script(load: Load) -> ModuleType:
    return load("train_reference_model")


def test_a_document_is_signatures_and_docstrings(text: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    path.write_text('"""A module."""\nclass A:\n    def f(self, x=1):\n        "Say x."\n')
    assert text.documented(path) == "A module.\n\nf(self, x=1)\n    Say x.\n"
    path.write_text("def broken(:")
    assert text.documented(path) == ""


def test_no_document_and_no_long_paragraph_is_in_both_parts(
    text: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = "This paragraph is long enough to tell two topics apart, and it stands in every file."
    modules = []
    for index in range(200):
        path = tmp_path / f"m{index}.py"
        own = f"Text of file {index}, which no other file has. " * 12
        path.write_text(f'"""{own}\n\n{shared}\n"""\n')
        modules.append((f"package/m{index}.py", path))
    monkeypatch.setattr(text, "_modules", lambda: iter(modules))
    monkeypatch.setattr(text, "topics", {})
    documents = text.load_documents()
    assert documents.held_out
    assert len(documents.train) + len(documents.held_out) == 200
    assert all(text.is_held_out(name) for name in documents.held_out)
    assert not any(shared in one for one in documents.train.values())
    assert all(shared in one for one in documents.held_out.values())


def test_batches_go_over_every_window_once_and_depend_on_the_step_alone(text: ModuleType) -> None:
    stream = np.arange(100, dtype=np.int32)
    count = (100 - 8) // 8
    windows = np.concatenate([text.batch(stream, step, 1, 8, seed=3) for step in range(count)])
    assert len(np.unique(windows)) == count * 8
    assert np.array_equal(text.batch(stream, 2, 2, 8, 3), text.batch(stream, 2, 2, 8, 3))
    later = np.concatenate([text.batch(stream, count + i, 1, 8, seed=3) for i in range(count)])
    assert not np.array_equal(windows, later)


def test_training_that_was_stopped_goes_on_as_if_it_had_not_been(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "model_config", small(script.model_config))
    monkeypatch.setattr(script, "SCORED_TOKENS", 64)
    texts = script.Text(tokenizer(script), *(stream(seed) for seed in range(3)))
    recipe = script.Recipe(rows=2, window=32)
    through = run(script, texts, recipe, tmp_path / "through", [6])
    stopped = run(script, texts, recipe, tmp_path / "stopped", [3, 6])
    for name, weight in through.items():
        assert torch.allclose(weight, stopped[name], atol=1e-6), name
    assert (tmp_path / "stopped" / "model.safetensors").exists()


class Cut:
    """A budget whose run is stopped after ``end`` steps, on the schedule of the whole."""

    def __init__(self, whole: Any, end: int) -> None:
        self.whole, self.end = whole, end

    def done(self, step: int, seconds: float) -> float:
        return 1.0 if step >= self.end else float(self.whole.done(step, seconds))


def small(config: Any) -> Any:
    def shrunk(vocab_size: int, context: int) -> Any:
        large = config(vocab_size, context)
        large.hidden_size, large.intermediate_size, large.num_hidden_layers = 32, 64, 1
        large.head_dim = 8
        return large

    return shrunk


def tokenizer(script: ModuleType) -> Any:
    return script.train_tokenizer(["The for statement is used to iterate."], 300)


def stream(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, 400).astype(np.int32)


def run(
    script: ModuleType, text: Any, recipe: Any, output: Path, ends: list[int]
) -> dict[str, torch.Tensor]:
    """Train up to each of ``ends``, beginning anew from what is on disk; the weights at last."""
    (output / "training").mkdir(parents=True)
    for end in ends:
        torch.manual_seed(0)
        model = script.LlamaForCausalLM(script.model_config(300, 32))
        budget = Cut(script.Budget(6, 1.0), end)
        script.train(model, text, recipe, budget, output, 60.0, seed=0)
    return {name: weight.detach() for name, weight in model.named_parameters()}
