"""Static activations: this route computes what the graph says, on floats, and says that it does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import hal
from hal.ir.evaluate import evaluate
from tests.passes.quantize.cnn import images

torch = pytest.importorskip("torch")


def test_a_network_means_the_same_and_the_build_says_that_codes_are_widened(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(32, 32, 3, padding=1),
        torch.nn.ReLU6(),
        torch.nn.Flatten(),
        torch.nn.Linear(2048, 10),
    )
    x = images(4)
    bundle = hal.compile(
        model,
        (torch.from_numpy(x),),
        target="host:tvm",
        output=tmp_path / "m.hal",
        quantize="w8a8-static",
        calibration=x,
    )
    build = bundle.manifest.builds["host:tvm"]
    assert any(
        "no kernel that reads their codes" in n for n in build.segments[0]["record"]["notes"]
    )
    graph = bundle.graph()
    name, result = graph.signature().inputs[0].name, graph.signature().outputs[0].name
    right = evaluate(graph, {name: x})[result]
    with bundle.session() as session:
        found = session.run({name: x})[result]
    assert np.abs(found - right).max() < 0.03 * np.abs(right).max()
