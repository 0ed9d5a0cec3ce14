"""What the training scripts of this folder share: schedule, optimiser, scores, saving.

See `train_demo_model.py` and `train_reference_model.py`.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import (
    BarColumn,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from tokenizers import Tokenizer
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)


@dataclass(frozen=True)
class Schedule:
    """Learning rate over a run: a linear warm-up, then a cosine.

    Attributes:
        peak_learning_rate: reached after the warm-up; a cosine then takes it down to
            `final_learning_rate_fraction` of itself.
        warmup_fraction: part of the run spent on the linear warm-up.
        weight_decay: AdamW's, on matrices only.
    """

    peak_learning_rate: float = 3e-3
    final_learning_rate_fraction: float = 0.02
    warmup_fraction: float = 0.04
    weight_decay: float = 0.1
    gradient_clip: float = 1.0

    def learning_rate(self, done: float) -> float:
        """Learning rate when the part `done` of the run, in [0, 1], is behind us."""
        if done < self.warmup_fraction:
            return self.peak_learning_rate * max(done / self.warmup_fraction, 1e-2)
        cosine_done = min((done - self.warmup_fraction) / (1 - self.warmup_fraction), 1.0)
        floor = self.final_learning_rate_fraction
        cosine = 0.5 * (1 + math.cos(math.pi * cosine_done))
        return self.peak_learning_rate * (floor + (1 - floor) * cosine)


@dataclass(frozen=True)
class HeldOutScore:
    """How well held-out text is predicted."""

    loss: float
    """Mean cross-entropy, in nats per token."""
    bits_per_byte: float
    """The same information per byte of text, which does not depend on the tokenizer."""

    @property
    def perplexity(self) -> float:
        """`exp(loss)`, per token."""
        return math.exp(self.loss)


@dataclass(frozen=True)
class Budget:
    """When a run ends: after `steps` where given, otherwise after `minutes` of training."""

    steps: int | None
    minutes: float

    def done(self, step: int, seconds: float) -> float:
        """Part of the run that is behind us, in [0, 1]."""
        if self.steps is not None:
            return min(step / self.steps, 1.0)
        return min(seconds / (60 * self.minutes), 1.0)


def progress_columns(*fields: str) -> tuple[ProgressColumn, ...]:
    """Step, bar, the task's own `fields` (format strings), time gone and time left."""
    return (
        TextColumn("step {task.fields[step]}"),
        BarColumn(),
        TextColumn("  ".join(fields)),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )


def make_optimizer(model: PreTrainedModel, schedule: Schedule) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves normalisation weights alone."""
    matrices = [weight for weight in model.parameters() if weight.dim() >= 2]
    vectors = [weight for weight in model.parameters() if weight.dim() < 2]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": schedule.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=schedule.peak_learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )


def training_step(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batch: torch.Tensor,
    schedule: Schedule,
    done: float,
    loss_of: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> float:
    """One optimiser step on token ids `[rows, tokens]`; returns the loss in nats per token.

    The loss is that of the next token, or what `loss_of` makes of the batch.
    """
    for group in optimizer.param_groups:
        group["lr"] = schedule.learning_rate(done)
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if loss_of is None:
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        else:
            loss = loss_of(batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.gradient_clip)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.item())


@torch.no_grad()
def held_out_nats(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Information in `ids[1:]`, each predicted in windows of the model's longest sequence."""
    model.train(False)
    context = model.config.max_position_embeddings
    nats = 0.0
    for start in range(0, len(ids) - 1, context):
        window = ids[start : start + context + 1]
        logits = model(input_ids=window[None, :-1]).logits[0].float()
        nats += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    return nats


def save(model: PreTrainedModel, tokenizer: Tokenizer, output: Path, **special: str) -> None:
    """Write a Hugging Face directory, weights in float16; `model` itself is not changed.

    Buffers stay in float32, as the balancing biases of routers do in published weights. Each file
    takes its name when it is whole, so a reader may come while training goes on.

    Args:
        model: weights and config.
        tokenizer: saved as a fast tokenizer.
        output: directory.
        special: `eos_token=…` and others, as `PreTrainedTokenizerFast` takes them.
    """
    output.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".saving-", dir=output))
    halved = copy.deepcopy(model)
    for weight in halved.parameters():
        weight.data = weight.data.to(torch.float16)
    halved.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    halved.save_pretrained(temporary)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=model.config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
        **special,
    ).save_pretrained(temporary)
    for path in temporary.iterdir():
        path.replace(output / path.name)
    temporary.rmdir()


def load_checked(
    kind: type[PreTrainedModel], output: Path, texts: list[str]
) -> tuple[PreTrainedModel, Tokenizer]:
    """Load the saved directory as a user would, model in float32, and check the tokenizer.

    Raises:
        RuntimeError: `AutoTokenizer` and plain `tokenizers` disagree or lose characters.
    """
    model: Any = kind.from_pretrained(output, dtype=torch.float32)
    wrapped = AutoTokenizer.from_pretrained(output)
    plain = Tokenizer.from_file(str(output / "tokenizer.json"))
    for text in (*texts, "  two spaces,\ttab\n\nand é ☃ \n"):
        ids = plain.encode(text).ids
        if wrapped(text, verbose=False)["input_ids"] != ids or wrapped.decode(ids) != text:
            raise RuntimeError("AutoTokenizer and tokenizers read the saved tokenizer differently")
        if plain.decode(ids) != text:
            raise RuntimeError("the saved tokenizer does not give back the text it encoded")
    return model, plain


def generate(model: Any, tokenizer: Tokenizer, prompt: str, new_tokens: int = 120) -> str:
    """Continue `prompt` greedily; returns the prompt and its continuation."""
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    output = model.generate(ids, max_new_tokens=new_tokens, do_sample=False, use_cache=True)
    return str(tokenizer.decode(output[0].tolist()))
