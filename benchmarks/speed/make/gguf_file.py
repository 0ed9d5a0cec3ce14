"""A GGUF file of a checkpoint: ``gguf_file.py CHECKPOINT OUTPUT FORMAT``.

``f32`` is written here; other formats (``q4_0-pure``, ``q8_0``, …) are llama.cpp's own
quantization of that. ``-pure``: embedding and head in the same format as the layers.
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

Config = dict[str, Any]
Tensors = dict[str, np.ndarray]

_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    **{f"self_attn.{x}_proj.{y}": f"attn_{x}.{y}" for x in "qkv" for y in ("weight", "bias")},
    **{f"mlp.{x}_proj.weight": f"ffn_{x}.weight" for x in ("gate", "up", "down")},
    **{
        f"mlp.shared_experts.{x}_proj.weight": f"ffn_{x}_shexp.weight"
        for x in ("gate", "up", "down")
    },
}
_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "deepseek_v3": "deepseek2"}
_SIGMOID = 2


def write(checkpoint: Path, output: Path) -> None:
    """Write all numbers as float32."""
    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(output, _ARCHITECTURES[config["model_type"]])
    _facts(writer, config)
    tensors = {
        k: v
        for path in sorted(checkpoint.glob("*.safetensors"))
        for k, v in load_file(path).items()
    }
    for name, array in _renamed(tensors, config):
        writer.add_tensor(name, np.ascontiguousarray(array, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _facts(writer: gguf.GGUFWriter, config: Config) -> None:
    heads = config["num_attention_heads"]
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_rope_freq_base(float(theta))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(0)
    if config.get("kv_lora_rank"):
        _latent_facts(writer, config)
    else:
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_rope_dimension_count(config["hidden_size"] // heads)
    words = config["vocab_size"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"<t{i}>" for i in range(words)])
    writer.add_token_types([1] * words)
    writer.add_token_merges(["< t", "<t 1"])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])


def _latent_facts(writer: gguf.GGUFWriter, config: Config) -> None:
    rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    writer.add_head_count_kv(1)
    writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(rank + rope)
    writer.add_value_length(rank)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + rope)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_rope_dimension_count(rope)
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_group_count(config["n_group"])
    writer.add_expert_group_used_count(config["topk_group"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType(_SIGMOID))


def _renamed(tensors: Tensors, config: Config) -> Iterator[tuple[str, np.ndarray]]:
    experts: dict[str, list[np.ndarray]] = {}
    tied = config.get("tie_word_embeddings")
    for name, array in sorted(tensors.items()):
        if name in _TOP:
            if not (tied and name == "lm_head.weight"):
                yield _TOP[name], array
            continue
        _, _, layer, rest = name.split(".", 3)
        block = f"blk.{layer}."
        if rest.startswith("mlp.experts."):
            _, _, index, kind, _ = rest.split(".")
            found = experts.setdefault(f"{block}ffn_{kind.removesuffix('_proj')}_exps.weight", [])
            _put(found, int(index), array)
        elif rest == "self_attn.kv_b_proj.weight":
            yield from _latent_maps(block, array, config)
        else:
            yield block + _NAMES[rest], _rotary_pairs(rest, array, config)
    for name, arrays in experts.items():
        yield name, np.stack(arrays)


def _put(found: list[Any], index: int, array: np.ndarray) -> None:
    found.extend([None] * (index + 1 - len(found)))
    found[index] = array


def _latent_maps(block: str, array: np.ndarray, config: Config) -> Iterator[tuple[str, np.ndarray]]:
    """Maps from the latent to keys (turned over) and values, as llama.cpp absorbs them."""
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    whole = array.reshape(config["num_attention_heads"], nope + value, config["kv_lora_rank"])
    yield block + "attn_k_b.weight", whole[:, :nope].swapaxes(1, 2)
    yield block + "attn_v_b.weight", whole[:, nope:]


def _rotary_pairs(name: str, array: np.ndarray, config: Config) -> np.ndarray:
    """Queries and keys of a Llama with neighbours as pairs, as llama.cpp rotates them."""
    heads = {"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}
    key = heads.get(name.rsplit(".", 1)[0])
    if key is None or config["model_type"] != "llama":
        return array
    split = array.reshape(config[key], 2, -1, *array.shape[1:])
    return split.swapaxes(1, 2).reshape(array.shape)


def quantize(source: Path, output: Path, form: str) -> None:
    """llama.cpp's own quantization.

    Raises:
        RuntimeError: it refuses.
    """
    import llama_cpp

    kind, _, pure = form.partition("-")
    given = llama_cpp.llama_model_quantize_default_params()
    given.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    given.pure = bool(pure)
    code = llama_cpp.llama_model_quantize(
        str(source).encode(), str(output).encode(), ctypes.byref(given)
    )
    if code:
        raise RuntimeError(f"llama_model_quantize to {form} gives {code}")


def main(checkpoint: Path, output: Path, form: str) -> None:
    """Write one format."""
    if form == "f32":
        write(checkpoint, output)
        return
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        write(checkpoint, Path(folder) / "f32.gguf")
        quantize(Path(folder) / "f32.gguf", output, form)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
