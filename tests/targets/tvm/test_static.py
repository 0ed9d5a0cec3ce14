"""Static activations: this route computes what the graph says, on codes or says that it does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import hal
from hal.ir.evaluate import evaluate
from tests.kernels.support import chip, runs_here
from tests.passes.quantize.cnn import images

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("target", ["host:tvm", "x86-64-v3:tvm"])
def test_a_network_means_the_same_and_builds_say_where_codes_are_widened(
    tmp_path: Path, target: str
) -> None:
    if target != "host:tvm":
        runs_here("x86-64-v3")
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
        target=target,
        output=tmp_path / "m.hal",
        quantize="w8a8-static",
        calibration=x,
    )
    notes = bundle.manifest.builds[target].segments[0]["record"]["notes"]
    widened = any("no kernel that reads their codes" in n for n in notes)
    assert widened == (chip(target.partition(":")[0]).dot is None)
    graph = bundle.graph()
    name, result = graph.signature().inputs[0].name, graph.signature().outputs[0].name
    right = evaluate(graph, {name: x})[result]
    with bundle.session() as session:
        found = session.run({name: x})[result]
    assert np.abs(found - right).max() < 0.03 * np.abs(right).max()
