"""Train the reference language model that quantization is judged on, from nothing.

A plain decoder (grouped queries, rotary positions, SwiGLU) of 13 M parameters learns documentation
that is installed with Python packages (see `reference_text.py`), so no download is needed. The
model is not in the repository; it is written to hal's cache folder, with tokens to judge it on:

    python examples/train_reference_model.py --minutes 45
    hal compile ~/.cache/hal/models/reference -o reference.hal
    hal eval reference.hal --tokens ~/.cache/hal/models/reference/heldout.npy

A run that is stopped goes on from its last checkpoint when the same command is given again; with
more `--minutes`, a finished run goes on too. What is written:

    config.json, model.safetensors, tokenizer.json …   a Hugging Face directory, float16
    heldout.npy        int32 token ids of documents that training never saw
    calibration.npy    int32 token ids of training documents
    training/          what a run needs to go on; may be deleted
"""

import dataclasses
import json
import math
import os
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from demo_text import END_OF_TEXT, END_OF_TEXT_ID, PADDING, PADDING_ID, train_tokenizer
from reference_text import batch, encode, load_documents
from rich.console import Console
from rich.progress import Progress
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from training import (
    Budget,
    HeldOutScore,
    Schedule,
    generate,
    held_out_nats,
    load_checked,
    make_optimizer,
    progress_columns,
    save,
    training_step,
)
from transformers import LlamaConfig, LlamaForCausalLM

from hal.runtime.cache import cache_folder

SAMPLE_PROMPTS = ("Return the", "class Graph\n", "The for statement")

HELD_OUT_TOKENS = 128 * 256
CALIBRATION_TOKENS = 128 * 256
SCORED_TOKENS = 16 * 256
"""Held-out tokens that are scored in the middle of a run."""

_TOKENIZER_CHARACTERS = 4_000_000
"""Text that the tokenizer is trained on; more of it changes few merges."""

console = Console()


@dataclasses.dataclass(frozen=True)
class Recipe(Schedule):
    """Every number that shapes the training run; see `Schedule` for the others."""

    peak_learning_rate: float = 1.5e-3
    rows: int = 4
    window: int = 256


@dataclasses.dataclass
class Run:
    """How far training is, kept in the header of `training/state.safetensors`."""

    step: int = 0
    seconds: float = 0.0
    train_loss: float = math.nan
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Text:
    """The tokenizer and the three streams of token ids, int32."""

    tokenizer: Tokenizer
    train: np.ndarray
    held_out: np.ndarray
    calibration: np.ndarray


def model_config(vocab_size: int, context: int) -> LlamaConfig:
    """Sizes are multiples of 256, so that blocks and groups of any usual size divide them."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=512,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=context,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=PADDING_ID,
        attn_implementation="eager",  # faster than the fused kernel in bfloat16 on CPUs
    )


def prepare_text(output: Path, vocab_size: int) -> Text:
    """Read the documents, train the tokenizer and write the token files, unless they are there."""
    folder = output / "training"
    files = [folder / "train.npy", output / "heldout.npy", output / "calibration.npy"]
    tokenizer_file = folder / "tokenizer.json"
    if not all(path.exists() for path in [*files, tokenizer_file]):
        folder.mkdir(parents=True, exist_ok=True)
        documents = load_documents()
        texts = list(documents.train.values())
        order = np.random.default_rng(0).permutation(len(texts))
        shuffled = [texts[index] for index in order]
        console.print(
            f"{len(texts)} documents of {sum(map(len, texts)):,} characters to train on, "
            f"{len(documents.held_out)} held out"
        )
        ends = np.cumsum([len(text) for text in shuffled])
        some = shuffled[: int(np.searchsorted(ends, _TOKENIZER_CHARACTERS)) + 1]
        tokenizer = train_tokenizer(some, vocab_size)
        held_out = list(documents.held_out.values())
        mixed = [held_out[i] for i in np.random.default_rng(0).permutation(len(held_out))]
        train = encode(shuffled, tokenizer)
        streams = [
            train,
            encode(mixed, tokenizer)[: HELD_OUT_TOKENS + 1],
            train[:CALIBRATION_TOKENS],
        ]
        for path, stream in zip(files, streams, strict=True):
            np.save(path, stream)
        tokenizer.save(str(tokenizer_file))
    return Text(Tokenizer.from_file(str(tokenizer_file)), *(np.load(path) for path in files))


def save_checkpoint(
    folder: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW, run: Run
) -> None:
    """Write weights, moments and progress under a temporary name, then rename."""
    tensors = {}
    for name, weight in model.named_parameters():
        state = optimizer.state[weight]
        tensors[f"{name}.weight"] = weight.detach()
        tensors[f"{name}.mean"] = state["exp_avg"]
        tensors[f"{name}.square"] = state["exp_avg_sq"]
    facts = {"run": json.dumps(dataclasses.asdict(run))}
    temporary = folder / f"state-{os.getpid()}.tmp"
    save_file(tensors, temporary, metadata=facts)
    temporary.replace(folder / "state.safetensors")


def load_checkpoint(
    folder: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW, seed: int
) -> Run:
    """Go on from the checkpoint in `folder`, or begin if there is none."""
    path = folder / "state.safetensors"
    if not path.exists():
        return Run(seed=seed)
    with safe_open(path, "pt") as file:
        run = Run(**json.loads(file.metadata()["run"]))
    tensors = load_file(path)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(tensors[f"{name}.weight"])
            optimizer.state[weight] = {
                "step": torch.tensor(float(run.step)),
                "exp_avg": tensors[f"{name}.mean"],
                "exp_avg_sq": tensors[f"{name}.square"],
            }
    console.print(f"going on after step {run.step}, {run.seconds / 60:.1f} minutes")
    return run


def score(model: LlamaForCausalLM, text: Text, tokens: int) -> HeldOutScore:
    """Score the first `tokens` predictions of the held-out text."""
    ids = text.held_out[: tokens + 1]
    nats = held_out_nats(model, torch.from_numpy(ids.astype(np.int64)))
    size = len(text.tokenizer.decode(ids[1:].tolist()).encode())
    return HeldOutScore(nats / (len(ids) - 1), nats / math.log(2) / size)


def unigram_loss(text: Text, vocab_size: int) -> float:
    """Loss on the held-out text of token frequencies alone, in nats per token."""
    counts = np.bincount(text.train, minlength=vocab_size) + 1.0
    return float(-np.log(counts / counts.sum())[text.held_out[1:]].mean())


def train(
    model: LlamaForCausalLM,
    text: Text,
    recipe: Recipe,
    budget: Budget,
    output: Path,
    checkpoint_minutes: float,
    seed: int,
) -> Run:
    """Train `model` in place until `budget` is used up, leaving checkpoints on the way."""
    folder = output / "training"
    optimizer = make_optimizer(model, recipe)
    run = load_checkpoint(folder, model, optimizer, seed)
    clock = time.monotonic()
    saved = run.seconds
    with Progress(*progress_columns("loss {task.fields[loss]:.3f}"), console=console) as progress:
        bar = progress.add_task("train", total=1.0, step=run.step, loss=run.train_loss)
        while (done := budget.done(run.step, run.seconds)) < 1.0:
            ids = batch(text.train, run.step, recipe.rows, recipe.window, run.seed)
            loss = training_step(model, optimizer, torch.from_numpy(ids), recipe, done)
            run.step += 1
            known = not math.isnan(run.train_loss)
            run.train_loss = 0.98 * run.train_loss + 0.02 * loss if known else loss
            run.seconds += time.monotonic() - clock
            clock = time.monotonic()
            progress.update(bar, completed=done, step=run.step, loss=run.train_loss)
            if run.seconds - saved >= 60 * checkpoint_minutes:
                saved = run.seconds
                publish(model, text, output, folder, optimizer, run)
                clock = time.monotonic()
        progress.update(bar, completed=1.0)
    publish(model, text, output, folder, optimizer, run)
    return run


def publish(
    model: LlamaForCausalLM,
    text: Text,
    output: Path,
    folder: Path,
    optimizer: torch.optim.AdamW,
    run: Run,
) -> None:
    """Write the checkpoint and the Hugging Face directory as they are now, and say the score."""
    save_checkpoint(folder, model, optimizer, run)
    save(model, text.tokenizer, output, eos_token=END_OF_TEXT, pad_token=PADDING)
    now = score(model, text, SCORED_TOKENS)
    console.print(
        f"step {run.step}, {run.seconds / 60:.1f} minutes: training loss {run.train_loss:.3f}, "
        f"held-out loss {now.loss:.3f}, perplexity {now.perplexity:.1f}"
    )


def main(
    output: Annotated[
        Path | None, typer.Option(help="Directory to write to. [models/reference in hal's cache]")
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="Training time in all.")] = 45.0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Train for this many steps instead.")
    ] = None,
    vocab_size: Annotated[int, typer.Option(min=512, help="Tokens in the vocabulary.")] = 4096,
    checkpoint_minutes: Annotated[float, typer.Option(min=0.1)] = 3.0,
    seed: Annotated[int, typer.Option(help="Seed of the weights and the data order.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
) -> None:
    """Train the reference model, check it and write it as a Hugging Face directory."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    output = output or cache_folder("models") / "reference"
    recipe = Recipe()

    text = prepare_text(output, vocab_size)
    size = text.tokenizer.get_vocab_size()
    model = LlamaForCausalLM(model_config(size, recipe.window))
    unigram = unigram_loss(text, size)
    console.print(
        f"{len(text.train):,} training tokens; {model.num_parameters():,} parameters; "
        f"token frequencies alone have perplexity {math.exp(unigram):.0f}"
    )
    run = train(model, text, recipe, Budget(steps, minutes), output, checkpoint_minutes, seed)

    loaded, tokenizer = load_checked(LlamaForCausalLM, output, [])
    final = score(loaded, text, HELD_OUT_TOKENS)
    facts = {
        **dataclasses.asdict(run),
        "tokens": run.step * recipe.rows * recipe.window,
        "held_out_loss": final.loss,
        "held_out_perplexity": final.perplexity,
        "held_out_bits_per_byte": final.bits_per_byte,
        "unigram_perplexity": math.exp(unigram),
    }
    (output / "figures.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    console.print(f"held-out loss {final.loss:.3f}, perplexity {final.perplexity:.1f}")
    for prompt in SAMPLE_PROMPTS:
        console.rule()
        sample = generate(loaded, tokenizer, prompt)
        console.print(sample, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
