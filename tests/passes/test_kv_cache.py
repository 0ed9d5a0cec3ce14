"""The cache pass finds what to carry by price, whatever the exported model carries."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

import hal
from hal.errors import InputError
from hal.frontends import load
from hal.ir import Graph
from hal.ir.evaluate import evaluate
from hal.passes import KvCache, PassReport, Pipeline, default_pipeline
from hal.passes import _absorb as absorb
from hal.runtime.cache_options import CacheOptions, parse_kv_cache
from tests import models
from tests.passes import cache_toys as toys

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-5
PLENTY, SCARCE = 200.0, 0.1
"""Balances of machines with much and with little arithmetic for each byte."""


def passed(
    graph: Graph, mode: str = "auto", balance: float | None = None
) -> tuple[Graph, PassReport]:
    result, reports = default_pipeline(toys.machine(balance), mode).run(graph)
    return result, next(r for r in reports if r.name == "kv_cache")


def layers(graph: Graph) -> list[dict[str, Any]]:
    return list(graph.metadata["cache"]["layers"])


def carried(graph: Graph) -> dict[str, list[Any]]:
    """Dims of the state inputs by name."""
    names = {s.input for s in graph.state}
    return {
        v.name or "": [d if isinstance(d, int) else str(d.value) for d in v.shape or ()]
        for v in graph.graph.inputs
        if v.name in names
    }


def work_on_old_tokens(graph: Graph) -> Iterator[str]:
    """Products with a weight that have an operand as long as the past."""
    for node in graph.nodes():
        weights = [v for v in node.inputs if v is not None and v.const_value is not None]
        if node.op_type not in ("MatMul", "Gemm", "Einsum") or not weights:
            continue
        for value in node.inputs:
            assert value is not None
            assert value.shape is not None
            if any("past" in str(d) for d in value.shape):
                yield f"{node.name}: {value.name} {value.shape}"


def attention(graph: Graph) -> ir.Node:
    return next(n for n in graph.nodes() if n.op_type == "Attention")


# --- latent attention --------------------------------------------------------------------------


@pytest.mark.parametrize("carries", ["operands", "latent"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_latent_is_found_whatever_the_exported_model_carries(carries: str, bias: bool) -> None:
    graph = toys.latent(carries, bias=bias)
    result, report = passed(graph)
    width = toys.RANK + toys.ROPE
    assert carried(result) == {"past.0.latent": ["batch", 1, "past", width]}
    assert [s.kind for s in result.state] == ["latent"]
    assert layers(result)[0]["bytes"] == 4 * width
    assert report.matches == 1
    assert not list(work_on_old_tokens(result))
    assert toys.difference(graph, result) <= TOLERANCE


def test_attention_works_on_one_head_whose_values_are_a_prefix_of_its_keys() -> None:
    result, _ = passed(toys.latent("operands"))
    node = attention(result)
    _, key, value, mask, past_key, past_value = node.inputs
    assert mask is None
    assert node.attributes["is_causal"].value == 1
    assert past_key is not None
    assert past_key.name == "past.0.latent"
    assert node.outputs[1].name == "present.0.latent"
    for prefix, whole in ((value, key), (past_value, past_key)):
        assert prefix is not None
        cut = prefix.producer()
        assert cut is not None
        assert cut.op_type == "Slice"
        assert cut.inputs[0] is whole
        bounds = [v.const_value.numpy().tolist() for v in cut.inputs[1:] if v and v.const_value]
        assert bounds == [[0], [toys.RANK], [3], [1]]


def test_keys_and_values_are_carried_where_that_is_asked_for() -> None:
    graph = toys.latent("latent")
    result, _ = passed(graph, "expanded")
    assert carried(result) == {
        "past.0.key": ["batch", toys.HEADS, "past", toys.SIZE + toys.ROPE],
        "past.0.value": ["batch", toys.HEADS, "past", toys.SIZE],
    }
    assert toys.difference(graph, result) <= TOLERANCE
    assert not list(work_on_old_tokens(result))


def test_a_machine_poor_in_arithmetic_carries_keys_and_values() -> None:
    result, _ = passed(toys.latent("latent"), "auto", SCARCE)
    assert layers(result)[0]["form"] == "expanded"


def test_latents_that_share_nothing_are_two_states() -> None:
    graph = toys.two_latents()
    result, _ = passed(graph)
    assert carried(result) == {
        "past.0.key": ["batch", 1, "past", toys.PAIR],
        "past.0.value": ["batch", 1, "past", toys.PAIR],
    }
    assert toys.difference(graph, result) <= TOLERANCE


def test_large_matrices_are_computed_when_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(absorb, "LAZY_BYTES", 0)
    graph = toys.latent("operands")
    result, _ = passed(graph)
    maps = [v for n, v in result.graph.initializers.items() if n.endswith("_map")]
    assert len(maps) == 2
    assert all(isinstance(v.const_value, ir.LazyTensor) for v in maps)
    assert toys.difference(graph, result) <= TOLERANCE


def test_matrices_have_the_dtype_of_the_weights_that_they_are_made_of() -> None:
    graph = toys.in_half(toys.two_latents())
    result, _ = passed(graph)
    assert [s.kind for s in result.state] == ["key", "value"]
    assert layers(result)[0]["bytes"] == 2 * (toys.PAIR + toys.PAIR)
    maps = [v for n, v in result.graph.initializers.items() if n.endswith("_map")]
    assert {v.dtype for v in maps} == {ir.DataType.FLOAT16}
    assert toys.difference(graph, result, dtype="float16") <= 1e-2


# --- keys and values straight from the hidden state --------------------------------------------


def test_the_price_decides_whether_the_hidden_state_is_carried() -> None:
    graph = toys.plain(bias=True)
    rich, _ = passed(graph, balance=PLENTY)
    assert carried(rich) == {"past.0.latent": ["batch", 1, "past", toys.HIDDEN]}
    assert toys.difference(graph, rich) <= TOLERANCE
    poor, report = passed(graph, balance=SCARCE)
    assert carried(poor) == carried(graph)
    assert report.matches == 0
    prices = {o["form"]: o["price"] for o in layers(poor)[0]["alternatives"]}
    assert prices["latent"] > layers(poor)[0]["price"]


def test_a_bias_of_the_keys_is_not_absorbed_under_a_soft_cap() -> None:
    capped = toys.plain(bias=True, softcap=5.0)
    result, _ = passed(capped, balance=PLENTY)
    assert layers(result)[0]["form"] == "expanded"
    plain = toys.plain(softcap=5.0)
    absorbed, _ = passed(plain, balance=PLENTY)
    assert layers(absorbed)[0]["form"] == "latent"
    assert toys.difference(plain, absorbed) <= TOLERANCE


def test_what_cannot_be_absorbed_is_computed_again_only_on_demand() -> None:
    graph = toys.plain(norm=True)
    cheap, _ = passed(graph, balance=PLENTY)
    assert layers(cheap)[0]["form"] == "expanded"
    small, _ = passed(graph, "latent")
    assert layers(small)[0]["form"] == "recomputed"
    assert carried(small) == {"past.0.latent": ["batch", 1, "past", toys.HIDDEN]}
    assert list(work_on_old_tokens(small))
    assert toys.difference(graph, small) <= TOLERANCE


@pytest.mark.parametrize("repeat", [False, True])
def test_grouped_queries_carry_heads_that_are_not_repeated(repeat: bool) -> None:
    graph = toys.plain(kv_heads=2, rope=True, repeat=repeat)
    result, report = passed(graph)
    dims = ["batch", 2, "past", toys.SIZE]
    assert carried(result) == {"past.0.key": dims, "past.0.value": dims}
    assert report.matches == (1 if repeat else 0)
    assert layers(result)[0]["bytes_exported"] == (256 if repeat else 128)
    assert layers(result)[0]["bytes"] == 128
    assert toys.difference(graph, result) <= TOLERANCE


def test_rotary_embedding_is_never_behind_the_cut() -> None:
    result, _ = passed(toys.plain(rope=True), balance=1e9)
    cut = {c["op"] for c in layers(result)[0]["cut"]}
    assert "RotaryEmbedding" in cut
    turned = [n for n in result.nodes() if n.op_type == "RotaryEmbedding"]
    assert all("past" not in str(n.inputs[0].shape) for n in turned if n.inputs[0] is not None)


def test_state_that_others_read_stays_as_exported() -> None:
    graph = toys.latent("latent")
    past = next(v for v in graph.graph.inputs if v.name == "past.0.key")
    extra = ir.node("ReduceMax", [past], {"keepdims": 0})
    extra.outputs[0].name = "largest"
    extra.outputs[0].type, extra.outputs[0].shape = past.type, ir.Shape([])
    graph.graph.append(extra)
    graph.graph.outputs.append(extra.outputs[0])
    result, report = passed(graph)
    assert carried(result) == carried(graph)
    assert layers(result)[0]["form"] == "as exported"
    assert "'past.0.key' has other readers" in layers(result)[0]["reason"]
    assert report.matches == 0


def test_running_the_pass_twice_changes_nothing_more() -> None:
    once, _ = passed(toys.latent("operands"))
    twice, reports = Pipeline("again", (KvCache(),)).run(once)
    assert reports[0].matches == 0
    assert carried(twice) == carried(once)


def test_a_graph_without_state_is_left_alone() -> None:
    graph = toys.plain()
    graph.state = ()
    result, report = passed(graph)
    assert report.matches == 0
    assert "cache" not in result.metadata


# --- modes and options -------------------------------------------------------------------------


def test_latent_without_a_smaller_cut_says_what_the_cut_is() -> None:
    with pytest.raises(InputError, match=r"the smallest is '.*' \+ '.*', 256 bytes") as caught:
        passed(toys.plain(rope=True), "latent")
    assert "kv_cache='auto'" in caught.value.hint


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(InputError, match="unknown kv_cache mode 'latnt'") as caught:
        passed(toys.plain(), "latnt")
    assert "'latent'" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("auto", CacheOptions()),
        ("latent,int8", CacheOptions("latent", None, 8)),
        ("paged, expanded", CacheOptions("expanded", "paged")),
        ("int4,contiguous", CacheOptions("auto", "contiguous", 4)),
    ],
)
def test_words_of_the_option_combine(text: str, options: CacheOptions) -> None:
    assert parse_kv_cache(text) == options


@pytest.mark.parametrize("text", ["paged,contiguous", "int8,int4", "latent,expanded"])
def test_words_that_exclude_each_other_are_refused(text: str) -> None:
    first, second = text.split(",")
    with pytest.raises(InputError) as caught:
        parse_kv_cache(text)
    assert repr(first) in caught.value.message
    assert repr(second) in caught.value.message


@pytest.mark.parametrize(
    ("kv_cache", "state"), [("auto", ["0.latent"]), ("expanded", ["0.key", "0.value"])]
)
def test_a_compiled_model_carries_what_was_asked_for(
    kv_cache: str, state: list[str], tmp_path: Path
) -> None:
    graph = toys.latent("operands")
    path = tmp_path / "decoder.onnx"
    path.write_bytes(ir.to_proto(graph.stamp()).SerializeToString())
    bundle = hal.compile(path, target="host:onnxruntime", kv_cache=kv_cache)
    assert [s["name"] for s in bundle.manifest.state] == state
    rng = np.random.default_rng(3)
    steps = [rng.standard_normal((2, n, toys.HIDDEN)).astype(np.float32) for n in (4, 1, 2)]
    states = empty(graph)
    with bundle.session() as session:
        for x in steps:
            wanted = evaluate(graph, {"x": x, **states})
            states = {s.input: wanted[s.output] for s in graph.state}
            np.testing.assert_allclose(session(x), wanted["y"], atol=TOLERANCE)


def empty(graph: Graph) -> dict[str, np.ndarray]:
    """State of no tokens for a batch of two."""
    extents = {"batch": 2, "past": 0}
    return {
        name: np.zeros([d if isinstance(d, int) else extents[d] for d in dims], np.float32)
        for name, dims in carried(graph).items()
    }


# --- models of transformers --------------------------------------------------------------------

REAL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
"""Attention as published (fewer heads), in a narrow model of two layers."""


def test_real_dimensions_carry_the_latent_and_the_rotated_part(tmp_path: Path) -> None:
    module = models.build("deepseek_v3", **REAL)
    result, report = passed(load(models.save("deepseek_v3", tmp_path, **REAL)).graph)
    dims = ["batch", 1, "past", 512 + 64]
    assert carried(result) == {"past.0.latent": dims, "past.1.latent": dims}
    for layer in layers(result):
        assert layer["form"] == "latent"
        assert layer["bytes"] == (512 + 64) * 4
        assert layer["bytes_expanded"] == 8 * (128 + 64 + 128) * 4
    assert report.details["bytes per token"] == "4,608 exported, 4,608 carried"
    assert report.details["as keys and values"] == "20,480"
    assert not list(work_on_old_tokens(result))
    ids = np.random.default_rng(1).integers(3, 256, (2, 12))
    with torch.no_grad():
        wanted = module(torch.from_numpy(ids)).logits.numpy()
    states, at = empty(result), 0
    for length in (7, 1, 3, 1):
        found = evaluate(result, {"input_ids": ids[:, at : at + length], **states})
        states = {s.input: found[s.output] for s in result.state}
        assert np.abs(found["logits"] - wanted[:, at : at + length]).max() <= TOLERANCE
        at += length


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "mixtral"])
def test_grouped_query_models_are_left_as_they_are(name: str, tmp_path: Path) -> None:
    result, report = passed(load(models.save(name, tmp_path)).graph)
    assert report.matches == 0
    dims = ["batch", 2, "past", 16]
    assert list(carried(result).values()) == [dims] * 4


def test_nothing_in_the_compiler_knows_an_architecture_with_a_latent() -> None:
    names = re.compile(r"deepseek|\bmla\b|multi.?head.?latent", re.IGNORECASE)
    for folder in ("hal", "passes", "kernels", "targets"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not names.search(path.read_text()), path
