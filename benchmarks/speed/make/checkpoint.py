"""A Hugging Face folder of random weights: ``checkpoint.py NAME FOLDER [--quick]``.

Weights are rounded to bfloat16 and written as float32, so that formats of all contenders begin
with the same numbers.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from speed.shapes import shapes

del sys.path[0]  # what else lies there must not be taken for packages that transformers looks for

_SPECIAL = ["<s>", "</s>", "<unk>", "<pad>"]


def tokenizer() -> Any:
    """Bytes and a few merges; what reads it only wants one to be there."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 4, trainer)
    names = dict(zip(("bos_token", "eos_token", "unk_token", "pad_token"), _SPECIAL, strict=True))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


def main(name: str, folder: Path) -> None:
    """Make and write."""
    shape = {**shapes(), **shapes(quick=True)}[name]
    torch.manual_seed(0)
    config = getattr(transformers, shape.config_class)(**shape.config)
    model = getattr(transformers, shape.model_class)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
