"""The fine-tune for ternary weights: what it writes is on the grid that hal rounds to."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from hal.passes.quantize.rtn import round_to_nearest
from tests.examples.conftest import Load

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


def test_the_rounding_of_hal_changes_nothing_after_the_fine_tune(
    load: Load,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = load("train_ternary")
    corpus = load("demo_text").load_corpus()
    few = dataclasses.replace(corpus, held_out={"truth": corpus.held_out["truth"]})
    monkeypatch.setattr(script, "load_corpus", lambda: few)
    names = script.ternary_layers(script.MODEL)
    monkeypatch.setattr(script, "ternary_layers", lambda model: names)
    script.main(tmp_path, steps=2, threads=1)
    said = capsys.readouterr().out
    assert said.count("KL to the float model") == 3
    assert "trained for 2 steps" in said
    assert len(names) == 34
    weights = dict(script.load(tmp_path).named_parameters())
    for name in names:
        weight = weights[name if name in weights else f"{name}.weight"]
        matrix = weight.detach().reshape(-1, weight.shape[-1]).numpy()
        again = round_to_nearest(matrix, script.parse_format("ternary")).dequantized()
        np.testing.assert_array_equal(again, matrix)


def test_gradients_pass_the_rounding(load: Load) -> None:
    script = load("train_ternary")
    rounded = script.Ternary(script.parse_format("ternary-g32"))
    weight = torch.linspace(-1, 1, 64 * 2).reshape(2, 64).requires_grad_()
    result = rounded(weight)
    blocks = result.detach().reshape(-1, 32)
    assert all(len(block.abs().unique()) <= 2 for block in blocks)
    (result * torch.arange(64.0)).sum().backward()
    assert torch.equal(weight.grad, torch.arange(64.0).expand(2, 64))
