"""optimum-intel's export with NNCF's weights: ``openvino_language.py CHECKPOINT OUTPUT FORMAT``.

``int4``: symmetric groups of 32 in all layers, the head and the embedding too; ``int8``: NNCF's
default of 8 bits; ``fp16`` and ``fp32``. A tokenizer is put beside it for GenAI's pipeline.
"""

from __future__ import annotations

import sys
from pathlib import Path

import openvino
from openvino_tokenizers import convert_tokenizer
from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
from transformers import PreTrainedTokenizerFast


def main(source: str, output: Path, form: str) -> None:
    """Export, quantize, write."""
    settings = {
        "int4": OVWeightQuantizationConfig(
            bits=4, sym=True, group_size=32, ratio=1.0, all_layers=True
        ),
        "int8": OVWeightQuantizationConfig(bits=8, sym=False),
    }
    given = {"quantization_config": settings[form]} if form in settings else {"load_in_8bit": False}
    model = OVModelForCausalLM.from_pretrained(source, export=True, compile=False, **given)
    if form == "fp16":
        model.half()
    model.save_pretrained(output)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    parts = convert_tokenizer(tokenizer, with_detokenizer=True)
    for part, name in zip(parts, ("tokenizer", "detokenizer"), strict=True):
        openvino.save_model(part, output / f"openvino_{name}.xml")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
