"""One tiny language model with a tokenizer and a chat template, behind one server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

import hal
from hal.runtime.engine import EngineOptions
from hal.server import open_model
from tests import models
from tests.server.running import Running, serving

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n"
    "{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}{% endfor %}"
    "assistant:"
)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("server")
    source = folder / "model"
    torch.manual_seed(0)
    # Weights large enough for greedy text to depend on the whole prompt.
    config = models.tiny_config(
        "llama", vocab_size=1536, num_hidden_layers=1, initializer_range=0.4
    )
    transformers.LlamaForCausalLM(config).eval().save_pretrained(source)
    models.add_tokenizer(source, TEMPLATE)
    path = folder / "tiny.hal"
    hal.compile(source, target="host:tvm", kv_cache="paged", output=path, verify=False)
    return path


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Running]:
    options = EngineOptions(max_batch=32, max_waiting=300)
    with serving(open_model(hal.load(bundle), options=options), max_tokens=300) as running:
        yield running
    state = running.model.session.state
    assert not state.rows
    assert state.store is not None
    assert state.store.pages_in_use() == 0
