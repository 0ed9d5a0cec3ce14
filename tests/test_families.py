"""Every architecture family, from unmodified modelling code to both runtimes, equal to torch eager."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hal
from tests import models

ROUTES = ["host:onnxruntime", "host:tvm"]
TOLERANCE = 1e-4
DECODE_STEPS = 16
NEW_TOKENS = 64


# tests/conftest.py keeps a family's tests in one process, so that it is compiled once.
@pytest.fixture(scope="module", params=models.FAMILIES)
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, torch.nn.Module, hal.Bundle]:
    """Name, torch module and bundle (both routes, verified) of one family."""
    name = request.param
    source = models.save(name, tmp_path_factory.mktemp(name))
    return name, models.build(name), hal.compile(source, target=ROUTES)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("batch", "length"), [(1, 7), (3, 4)])
def test_equals_torch_eager(
    compiled: tuple[str, torch.nn.Module, hal.Bundle], route: str, batch: int, length: int
) -> None:
    name, module, bundle = compiled
    session = bundle.session(route)
    rng = np.random.default_rng(batch)
    if name in models.CAUSAL_LMS:
        _compare_language_model(module, session, rng, batch, length)
    elif name in models.ENCODERS:
        _compare_encoder(module, session, rng, batch, length)
    else:
        _compare_image_model(module, session, rng, batch)


@pytest.mark.parametrize("route", ROUTES)
def test_greedy_tokens_are_those_of_transformers(
    compiled: tuple[str, torch.nn.Module, hal.Bundle], route: str
) -> None:
    bundle, prompts, expected = _generation(compiled)
    session = bundle.session(route)
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert list(session.generate(prompt, max_new_tokens=NEW_TOKENS)) == tokens
        guessed = session.generate(prompt, max_new_tokens=NEW_TOKENS, prompt_lookup=4)
        assert list(guessed) == tokens
    batch = session.generate_batch(prompts, max_new_tokens=NEW_TOKENS, prefill_chunk=7)
    assert [row.token_ids for row in batch] == expected


@pytest.mark.parametrize("route", ROUTES)
def test_a_paged_cache_gives_the_same_tokens(
    compiled: tuple[str, Any, hal.Bundle], route: str
) -> None:
    bundle, prompts, expected = _generation(compiled)
    if bundle.manifest.builds[route].cache["fixed"]:
        bundle = bundle.retarget(route, kv_cache="paged", verify=False)
    session = bundle.session(route, kv_layout="paged")
    batch = session.generate_batch(prompts, max_new_tokens=NEW_TOKENS)
    assert [row.token_ids for row in batch] == expected


@pytest.mark.parametrize(("start", "goal"), [ROUTES, ROUTES[::-1]])
def test_a_conversation_moves_between_routes_and_layouts(
    compiled: tuple[str, Any, hal.Bundle], start: str, goal: str, tmp_path: Path
) -> None:
    bundle, prompts, continuations = _generation(compiled)
    prompt, expected = prompts[0], continuations[0]
    layout = None if bundle.manifest.builds[start].cache["fixed"] else "paged"
    first = bundle.session(start, kv_layout=layout)
    said = first.generate(prompt, max_new_tokens=NEW_TOKENS // 2)
    assert list(said) == expected[: NEW_TOKENS // 2]
    first.export_state([said.held_ids]).save(tmp_path / "state")
    second = bundle.session(goal)
    state = second.import_state(tmp_path / "state")
    assert state.token_ids is not None
    rest = second.generate(
        prompt + expected[: NEW_TOKENS // 2],
        held=state.token_ids[0],
        max_new_tokens=NEW_TOKENS // 2,
    )
    assert list(rest) == expected[NEW_TOKENS // 2 :]
    assert rest.stats()["reused_tokens"] == len(state.token_ids[0])


_EXPECTED: dict[str, tuple[list[list[int]], list[list[int]]]] = {}


def _generation(
    compiled: tuple[str, torch.nn.Module, hal.Bundle],
) -> tuple[hal.Bundle, list[list[int]], list[list[int]]]:
    """A language model's bundle, prompts, and what transformers continues them with."""
    name, module, bundle = compiled
    if name not in models.CAUSAL_LMS:
        pytest.skip("no language model")
    if name not in _EXPECTED:
        rng = np.random.default_rng(5)
        prompts = [rng.integers(3, module.config.vocab_size, n).tolist() for n in (5, 12)]
        _EXPECTED[name] = prompts, [_greedy(module, prompt) for prompt in prompts]
    return bundle, *_EXPECTED[name]


def _greedy(module: Any, prompt: list[int]) -> list[int]:
    """What transformers continues a prompt with."""
    ids = torch.tensor([prompt])
    out = module.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def test_tvm_takes_every_node(compiled: tuple[str, torch.nn.Module, hal.Bundle]) -> None:
    _, _, bundle = compiled
    placement = bundle.manifest.builds["host:tvm"].placement
    assert placement["refused"] == []


def _compare_language_model(
    module: torch.nn.Module, session: hal.Session, rng: np.random.Generator, batch: int, length: int
) -> None:
    vocabulary = module.config.vocab_size
    total = length + DECODE_STEPS
    ids = rng.integers(0, vocabulary, (batch, total))
    with torch.no_grad():
        expected = module(torch.from_numpy(ids[:, :length]), use_cache=True)
        actual = session.run({"input_ids": ids[:, :length]})["logits"]
        assert np.abs(actual - expected.logits.numpy()).max() <= TOLERANCE
        for at in range(length, total):
            step = ids[:, at : at + 1]
            expected = module(
                torch.from_numpy(step), past_key_values=expected.past_key_values, use_cache=True
            )
            actual = session.run({"input_ids": step})["logits"]
            assert np.abs(actual - expected.logits.numpy()).max() <= TOLERANCE
    assert session.position == total


def _compare_encoder(
    module: torch.nn.Module, session: hal.Session, rng: np.random.Generator, batch: int, length: int
) -> None:
    mask = np.ones((batch, length), np.int64)
    mask[-1, length // 2 :] = 0 if batch > 1 else 1
    inputs = {
        "input_ids": rng.integers(0, module.config.vocab_size, (batch, length)),
        "attention_mask": mask,
        "token_type_ids": np.zeros((batch, length), np.int64),
    }
    inputs = {s.name: inputs[s.name] for s in session.inputs}
    with torch.no_grad():
        expected = module(**{k: torch.from_numpy(v) for k, v in inputs.items()})
    actual = session.run(inputs)
    for name, value in actual.items():
        assert np.abs(value - expected[name].numpy()).max() <= TOLERANCE


def _compare_image_model(
    module: torch.nn.Module, session: hal.Session, rng: np.random.Generator, batch: int
) -> None:
    dims = session.inputs[0].dims
    assert dims is not None
    image = rng.standard_normal((batch, *dims[1:])).astype(np.float32)
    with torch.no_grad():
        expected = module(torch.from_numpy(image)).logits.numpy()
    assert np.abs(session(image) - expected).max() <= TOLERANCE


def test_node_count_does_not_grow_with_experts(tmp_path: Path) -> None:
    counts = {}
    for experts in (8, 64):
        source = models.save("deepseek_v3", tmp_path / str(experts), n_routed_experts=experts)
        graph = hal.compile(source, verify=False, target="host:onnxruntime").graph()
        kinds = [n.op_type for n in graph.nodes() if n.domain == "hal"]
        assert kinds == ["MixtureOfExperts"]  # one MoE layer of two (the first is dense)
        counts[experts] = graph.node_count()
    assert counts[8] == counts[64]
