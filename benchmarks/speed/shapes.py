"""The models that are measured, by their configurations; weights are random and seeded.

Two dense shapes in daily use on small machines, and a small one of the latent-attention family
with experts. ``quick`` ones have the same form and next to no weights: they try the plumbing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

POSITIONS = 16384
_COMMON = {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 3,
    "tie_word_embeddings": True,
    "max_position_embeddings": POSITIONS,
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A language model: the names of its classes in transformers, and its configuration."""

    name: str
    title: str
    config_class: str
    model_class: str
    config: dict[str, Any]

    @property
    def linear_parameters(self) -> int:
        """Weights of matrices that one token multiplies with: layers and head, chosen experts."""
        c = self.config
        hidden, head = c["hidden_size"], c["hidden_size"] * c["vocab_size"]
        layers = c["num_hidden_layers"]
        if "kv_lora_rank" in c:
            dense = c["first_k_dense_replace"]
            experts = c["num_experts_per_tok"] + c["n_shared_experts"]
            wide = dense * c["intermediate_size"]
            wide += (layers - dense) * experts * c["moe_intermediate_size"]
            router = (layers - dense) * hidden * c["n_routed_experts"]
            return layers * _latent_attention(c) + 3 * hidden * wide + router + head
        dim = hidden // c["num_attention_heads"]
        attention = 2 * hidden * dim * (c["num_attention_heads"] + c["num_key_value_heads"])
        return int(layers * (attention + 3 * hidden * c["intermediate_size"]) + head)

    def cache_numbers(self) -> int:
        """Numbers that are carried for each token."""
        c = self.config
        if "kv_lora_rank" in c:
            return int(c["num_hidden_layers"] * (c["kv_lora_rank"] + c["qk_rope_head_dim"]))
        dim = c["hidden_size"] // c["num_attention_heads"]
        return int(2 * c["num_hidden_layers"] * c["num_key_value_heads"] * dim)


def _latent_attention(c: dict[str, Any]) -> int:
    """Weights of one layer's attention of the latent kind."""
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    nope, rope, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    query = hidden * c["q_lora_rank"] + c["q_lora_rank"] * heads * (nope + rope)
    latent = hidden * (c["kv_lora_rank"] + rope) + c["kv_lora_rank"] * heads * (nope + value)
    return int(query + latent + heads * value * hidden)


def _llama(quick: bool) -> dict[str, Any]:
    sizes = (256, 2, 4, 2, 512, 2048) if quick else (960, 32, 15, 5, 2560, 49152)
    return {**_dense(*sizes), "rms_norm_eps": 1e-5, "rope_theta": 100000.0}


def _qwen2(quick: bool) -> dict[str, Any]:
    sizes = (256, 2, 4, 2, 512, 4096) if quick else (896, 24, 14, 2, 4864, 151936)
    return {**_dense(*sizes), "rms_norm_eps": 1e-6, "rope_theta": 1000000.0}


def _dense(
    hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocabulary: int
) -> dict[str, Any]:
    return {
        **_COMMON,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
    }


def _deepseek(quick: bool) -> dict[str, Any]:
    return {
        **_COMMON,
        "tie_word_embeddings": False,
        "vocab_size": 2048 if quick else 32000,
        "hidden_size": 256 if quick else 1024,
        "intermediate_size": 512 if quick else 2816,
        "moe_intermediate_size": 128 if quick else 512,
        "num_hidden_layers": 2 if quick else 8,
        "first_k_dense_replace": 1,
        "num_attention_heads": 4 if quick else 16,
        "num_key_value_heads": 4 if quick else 16,
        "q_lora_rank": 128 if quick else 768,
        "kv_lora_rank": 128 if quick else 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "n_routed_experts": 8 if quick else 32,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2 if quick else 4,
        "n_group": 2 if quick else 4,
        "topk_group": 1 if quick else 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
    }


def shapes(quick: bool = False) -> dict[str, Shape]:
    """Shapes by name; names of quick ones end in ``-quick``."""
    end, note = ("-quick", ", quick") if quick else ("", "")
    made = [
        Shape(
            f"llama-0.36b{end}", f"Llama shape, 0.36 B{note}", "LlamaConfig", "LlamaForCausalLM",
            _llama(quick),
        ),
        Shape(
            f"qwen2-0.5b{end}", f"Qwen2 shape, 0.5 B{note}", "Qwen2Config", "Qwen2ForCausalLM",
            _qwen2(quick),
        ),
        Shape(
            f"deepseek-0.5b{end}", f"DeepSeek-V3 shape, 0.5 B{note}", "DeepseekV3Config",
            "DeepseekV3ForCausalLM", _deepseek(quick),
        ),
    ]  # fmt: skip
    return {shape.name: shape for shape in made}
