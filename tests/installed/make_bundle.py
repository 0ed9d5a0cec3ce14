"""Make a small bundle with carried state, for the check of the wheel in a clean environment.

Runs in the development environment, with torch and transformers.
"""

import sys
import tempfile
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

import hal


def main() -> None:
    """Compile a tiny language model to the path on the command line."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        hal.compile(folder, target="host:onnxruntime", output=Path(sys.argv[1]))


if __name__ == "__main__":
    main()
