"""Models and bundles that several tests of the compiler use; none of them changes one."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
import torch

import hal
from tests import files, graphs, models
from tests.compiler.support import ROUTE


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return files.save_mlp(tmp_path_factory.mktemp("model") / "mlp.onnx")


@pytest.fixture(scope="session")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> hal.Bundle:
    return hal.compile(model, target=ROUTE, output=tmp_path_factory.mktemp("out") / "mlp")


@pytest.fixture(scope="session")
def memory(tmp_path_factory: pytest.TempPathFactory) -> hal.Bundle:
    """A model with carried state: a sum over everything that was ever passed in."""
    path = tmp_path_factory.mktemp("memory") / "memory.onnx"
    path.write_bytes(ir.to_proto(graphs.accumulator().stamp()).SerializeToString())
    return hal.compile(path, target=ROUTE)


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, hal.Bundle]:
    folder = models.save("llama", tmp_path_factory.mktemp("lm"), num_hidden_layers=1)
    return models.build("llama", num_hidden_layers=1), hal.compile(folder, target=ROUTE)
