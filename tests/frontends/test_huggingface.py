"""Hugging Face directories; every family through both runtimes is in tests/test_families.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hal import ExportError, ModelError
from hal.frontends import huggingface
from hal.frontends.causal_lm import CausalLM
from tests import models
from tests.frontends.reference import decode_difference, run, session

# test_families has all of them on every run
SLOW = set(models.CAUSAL_LMS) - {"llama"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in models.CAUSAL_LMS],
)
def test_prefill_and_cached_decoding_equal_torch(name: str, tmp_path: Path) -> None:
    loaded = huggingface.from_directory(models.save(name, tmp_path))
    graph = loaded.graph
    assert graph.metadata["task"] == "causal-lm"
    assert graph.metadata["eos_token_ids"] == [2]
    signature = graph.signature()
    assert [str(s) for s in signature.inputs] == ["input_ids: int64[batch, sequence]"]
    assert [str(s) for s in signature.outputs] == ["logits: float32[batch, sequence, 256]"]
    grown = next(s for s in signature.state if s.growth_axis is not None)
    assert grown.axes == ("batch", "head", "position", "channel")
    assert graph.output_specs()["present.1.value"].dims[2] == "past + sequence"
    # One graph serves batch 1, one token, no past, and (for a window of 8) lengths beyond it.
    model = models.build(name)
    assert decode_difference(model, graph, batch=1, prompt=1, steps=16) <= 1e-4
    assert decode_difference(model, graph, batch=2, prompt=11, steps=16) <= 1e-4


@pytest.mark.slow
def test_a_mixture_of_experts_is_one_node_however_many_experts() -> None:
    counts = []
    for experts in (8, 64):
        model = models.build(
            "deepseek_v3", n_routed_experts=experts, num_hidden_layers=1, first_k_dense_replace=0
        )
        graph = huggingface.from_pretrained_model(model)
        assert sum(n.op_type == "MixtureOfExperts" for n in graph.nodes()) == 1
        counts.append(graph.node_count())
    assert counts[0] == counts[1]
    assert model.config._experts_implementation != "hal"


def test_the_cache_layout_is_found_by_looking_at_what_grows() -> None:
    layout = CausalLM(models.build("gemma3")).layout
    assert [(i.layer, i.kind) for i in layout] == [
        (0, "key"),
        (0, "value"),
        (1, "key"),
        (1, "value"),
    ]
    assert {(i.batch_axis, i.growth_axis) for i in layout} == {(0, 2)}


@pytest.mark.parametrize("name", ["bert", pytest.param("bert_classifier", marks=pytest.mark.slow)])
def test_an_encoder_equals_torch_under_a_mask(name: str, tmp_path: Path) -> None:
    graph = huggingface.from_directory(models.save(name, tmp_path)).graph
    assert [s.name for s in graph.signature().inputs] == [
        "input_ids",
        "attention_mask",
        "token_type_ids",
    ]
    model, sess = models.build(name), session(graph)
    for batch, length in ((2, 7), (1, 3)):
        inputs = models.example(name, batch, length)
        with torch.no_grad():
            want = model(**inputs)
        for key, value in run(sess, inputs).items():
            np.testing.assert_allclose(value, want[key], atol=1e-4)


@pytest.mark.parametrize(
    "name", ["vit", *(pytest.param(n, marks=pytest.mark.slow) for n in ("resnet", "convnext"))]
)
def test_an_image_classifier_equals_torch(name: str, tmp_path: Path) -> None:
    graph = huggingface.from_directory(models.save(name, tmp_path)).graph
    assert graph.metadata["task"] == "image-classifier"
    assert str(graph.signature().inputs[0]) == "pixel_values: float32[batch, 3, 32, 32]"
    model, sess = models.build(name), session(graph)
    for batch in (1, 3):
        inputs = models.example(name, batch)
        with torch.no_grad():
            want = model(**inputs).logits
        np.testing.assert_allclose(run(sess, inputs)["logits"], want, atol=1e-4)


def test_tokenizer_files_and_chat_template_are_found(tmp_path: Path) -> None:
    path = models.save("vit", tmp_path)
    (path / "tokenizer.json").write_text("{}")
    (path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    (path / "preprocessor_config.json").write_text('{"size": {"height": 16, "width": 8}}')
    assert huggingface._has_chat_template(path)
    assert huggingface._preprocessor_size(path) == (16, 8)


def config_only(path: Path, **fields: object) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(fields))
    return path


def test_a_directory_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        huggingface.from_directory(tmp_path)


def test_a_config_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": [')
    with pytest.raises(ModelError, match=r"config\.json is not valid JSON"):
        huggingface.from_directory(tmp_path)


def test_an_unknown_architecture_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    path = config_only(tmp_path, architectures=["LlamaForCausalLMs"], model_type="llama")
    with pytest.raises(ModelError, match="unknown architecture 'LlamaForCausalLMs'") as error:
        huggingface.from_directory(path)
    assert "did you mean 'LlamaForCausalLM'?" in error.value.hint


def test_code_that_ships_with_a_model_is_not_run(tmp_path: Path) -> None:
    path = config_only(tmp_path, architectures=["MyModel"], auto_map={"AutoModel": "my.MyModel"})
    with pytest.raises(ModelError, match="unknown architecture") as error:
        huggingface.from_directory(path)
    assert "is not run" in error.value.hint


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    path = config_only(tmp_path, architectures=["BertModel"], model_type="bert")
    with pytest.raises(ModelError, match=r"has no weights \(\*\.safetensors\)"):
        huggingface.from_directory(path)
    (path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError) as error:
        huggingface.from_directory(path)
    assert "pickled" in error.value.hint


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    path = models.save("vit", tmp_path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"weights in .* cannot be loaded"):
        huggingface.from_directory(path)


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    path = models.save("vit", tmp_path)
    config = json.loads((path / "config.json").read_text())
    config["num_hidden_layers"] = 3
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"lack 'vit\..*layer.*2.* and \d+ more"):
        huggingface.from_directory(path)


def test_a_model_of_another_kind_says_what_is_supported() -> None:
    import transformers

    config = transformers.T5Config(
        vocab_size=32, d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8
    )
    with pytest.raises(ExportError, match="neither a causal LM"):
        huggingface.from_pretrained_model(transformers.T5Model(config))
