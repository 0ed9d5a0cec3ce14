"""Tiny random-weight models of every architecture family, built from real transformers configs.

>>> model = build("deepseek_v3")            # torch module in eval mode, the same weights each time
>>> path = save("bert", tmp_path)           # a directory as `save_pretrained` writes it
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers as tf

DEMO = Path(__file__).parents[1] / "examples" / "demo_model"

CAUSAL_LMS = (
    "llama",
    "qwen3",
    "gemma3",
    "mixtral",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
    "qwen3_next",
)
ENCODERS = ("bert", "bert_classifier")
IMAGE_CLASSIFIERS = ("vit", "resnet", "convnext")
FAMILIES = CAUSAL_LMS + ENCODERS + IMAGE_CLASSIFIERS

_LM: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT: dict[str, Any] = {
    **_LM,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "qk_nope_head_dim": 16,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
_BERT: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}

_TINY: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (tf.LlamaConfig, tf.LlamaForCausalLM, _LM),
    "qwen3": (tf.Qwen3Config, tf.Qwen3ForCausalLM, {**_LM, "head_dim": 16}),
    "gemma3": (
        tf.Gemma3TextConfig,
        tf.Gemma3ForCausalLM,
        {
            **_LM,
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "mixtral": (
        tf.MixtralConfig,
        tf.MixtralForCausalLM,
        {**_LM, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": (
        tf.Qwen3MoeConfig,
        tf.Qwen3MoeForCausalLM,
        {
            **_LM,
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
    ),
    "deepseek_v2": (
        tf.DeepseekV2Config,
        tf.DeepseekV2ForCausalLM,
        {**_LATENT, "n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    ),
    "deepseek_v3": (tf.DeepseekV3Config, tf.DeepseekV3ForCausalLM, _LATENT),
    "qwen3_next": (
        tf.Qwen3NextConfig,
        tf.Qwen3NextForCausalLM,
        {
            **_LM,
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
    ),
    "bert": (tf.BertConfig, tf.BertModel, _BERT),
    "bert_classifier": (
        tf.BertConfig,
        tf.BertForSequenceClassification,
        {**_BERT, "num_labels": 3},
    ),
    "vit": (
        tf.ViTConfig,
        tf.ViTForImageClassification,
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "num_labels": 5,
        },
    ),
    "resnet": (
        tf.ResNetConfig,
        tf.ResNetForImageClassification,
        {
            "embedding_size": 8,
            "hidden_sizes": [8, 16, 24, 32],
            "depths": [1, 1, 1, 1],
            "num_labels": 5,
            "image_size": 32,  # no field of its own; read by whoever needs an input size
        },
    ),
    "convnext": (
        tf.ConvNextConfig,
        tf.ConvNextForImageClassification,
        {
            "hidden_sizes": [8, 16, 24, 32],
            "depths": [1, 1, 1, 1],
            "image_size": 32,
            "num_labels": 5,
        },
    ),
}


def tiny_config(name: str, **overrides: Any) -> tf.PretrainedConfig:
    """The tiny config of a family; ``overrides`` replace fields of the transformers config."""
    config, _, fields = _TINY[name]
    return config(**{**fields, **overrides})


def build(name: str, **overrides: Any) -> tf.PreTrainedModel:
    """The tiny model of a family in eval mode, fp32, with the same random weights every time.

    Everything that is saved is perturbed, so that norms, biases and router corrections that
    transformers initializes to a constant matter in a comparison.
    """
    torch.manual_seed(0)
    model = _TINY[name][1](tiny_config(name, **overrides)).eval()
    with torch.no_grad():
        for tensor in {t.data_ptr(): t for t in model.state_dict().values()}.values():
            if tensor.dtype == torch.float32 and tensor.numel() > 1:
                tensor.add_(torch.rand_like(tensor) * 0.05)
    return model


def save(name: str, directory: Path, **overrides: Any) -> Path:
    """Write the tiny model of a family as a Hugging Face directory and return its path."""
    path = directory / name
    build(name, **overrides).save_pretrained(path)
    return path


def add_tokenizer(source: Path, template: str | None = None) -> Path:
    """Give a saved language model of 1,536 tokens the demonstration's tokenizer; return ``source``."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, source)
    if template is not None:
        (source / "chat_template.jinja").write_text(template)
    return source


def example(name: str, batch: int = 2, length: int = 7) -> dict[str, torch.Tensor]:
    """Inputs by name for a family: token ids of ``[batch, length]``, or images of 32x32."""
    generator = torch.Generator().manual_seed(batch * 100 + length)
    if name in IMAGE_CLASSIFIERS:
        return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator)}
    ids = torch.randint(3, 256, (batch, length), generator=generator)
    if name in CAUSAL_LMS:
        return {"input_ids": ids}
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[-1, length - 2 :] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": torch.zeros_like(ids),
    }
