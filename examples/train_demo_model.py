"""Train the small demonstration model in `examples/demo_model` from nothing.

The result is a language model with the DeepSeek-V3 architecture (multi-head latent attention,
a first dense layer, then mixture-of-experts layers with a shared expert and group-limited
routing), at a size that fits in a repository. It learns the text of Python's own documentation
topics, which ship with every Python as `pydoc_data.topics`, so no download is needed. The
modelling code is `transformers.DeepseekV3ForCausalLM`, unchanged.

    python examples/train_demo_model.py --minutes 25 --output examples/demo_model
    python examples/train_demo_model.py --steps 200 --output /tmp/quick

`--steps` fixes the work, `--minutes` the time. Two runs with one seed start alike and end close
to each other, but not equal: the tokenizer's dropout (see `Recipe`) cannot be seeded.
"""

import math
import platform
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from demo_text import (
    END_OF_TEXT,
    END_OF_TEXT_ID,
    PADDING,
    PADDING_ID,
    Corpus,
    TrainingText,
    load_corpus,
    train_tokenizer,
)
from rich.console import Console
from rich.progress import Progress
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
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

SAMPLE_PROMPTS = ("The for statement", "Python", "A class definition ")

MAX_WEIGHTS_BYTES = 8_000_000

console = Console()


@dataclass(frozen=True)
class Recipe(Schedule):
    """Every number that shapes the training run; see `Schedule` for the others.

    Attributes:
        context: the model's longest sequence, in tokens.
        short_context: length of the training windows before the finish; short windows cost less
            attention.
        finish_fraction: last part of the run, on windows of the full `context` and on text
            encoded without dropout.
        batch_tokens: tokens in one optimiser step.
        bpe_dropout: probability of skipping a merge when the training text is encoded, before
            the finish. The text is small, so each pass over it is cut into different tokens,
            which delays memorising (https://arxiv.org/abs/1910.13267).
        router_bias_speed: the step `gamma` of the auxiliary-loss-free load balancing of
            DeepSeek-V3 (https://arxiv.org/abs/2412.19437, section 2.1.2).
    """

    context: int = 512
    short_context: int = 256
    finish_fraction: float = 0.35
    batch_tokens: int = 1024
    bpe_dropout: float = 0.1
    router_bias_speed: float = 1e-3

    def finishing(self, done: float) -> bool:
        """Whether the finish has begun when the part `done` of the run is behind us."""
        return done >= 1 - self.finish_fraction


@dataclass
class TrainingLog:
    """What a run did, for the model card."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    train_loss: float = math.nan
    held_out: list[tuple[int, HeldOutScore]] = field(default_factory=list)


def model_config(vocab_size: int, context: int) -> DeepseekV3Config:
    """DeepSeek-V3's shape made small: every mechanism is kept, every size is a multiple of 16."""
    return DeepseekV3Config(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=64,
        kv_lora_rank=48,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        max_position_embeddings=context,
        initializer_range=0.04,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        num_mtp_layers=0,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=PADDING_ID,
    )


class RouterBalancer:
    """Balances the experts' load by DeepSeek-V3's rule, without an auxiliary loss.

    Each router adds a bias to its scores when it chooses experts (not when it weighs them).
    After each step the bias of an expert with less than the mean load rises by `speed`, that of
    an expert with more falls by `speed`.
    """

    def __init__(self, model: DeepseekV3ForCausalLM, speed: float) -> None:
        """Count the loads of `model`'s routers from now on."""
        self._speed = speed
        dense_layers = model.config.first_k_dense_replace
        self._routers = [layer.mlp.gate for layer in model.model.layers[dense_layers:]]
        experts = model.config.n_routed_experts
        self._loads = [torch.zeros(experts) for _ in self._routers]
        for router, load in zip(self._routers, self._loads, strict=True):
            router.register_forward_hook(self._counter(load))

    @staticmethod
    def _counter(load: torch.Tensor) -> Callable[..., None]:
        """A forward hook that adds the tokens sent to each expert to `load`, `[experts]`."""

        def count(module: torch.nn.Module, _: object, output: tuple[torch.Tensor, ...]) -> None:
            if module.training:
                load.add_(torch.bincount(output[2].flatten(), minlength=load.numel()))

        return count

    @torch.no_grad()
    def step(self) -> float:
        """Move every bias by one step and forget the counts.

        Returns:
            The largest load of any expert over its layer's mean load: 1.0 is perfect balance.
        """
        worst = 1.0
        for router, load in zip(self._routers, self._loads, strict=True):
            worst = max(worst, float(load.max() / load.mean()))
            router.e_score_correction_bias += self._speed * torch.sign(load.mean() - load)
            load.zero_()
        return worst


def score_held_out(
    model: DeepseekV3ForCausalLM, tokenizer: Tokenizer, texts: list[str]
) -> HeldOutScore:
    """Predict each text from its own beginning."""
    streams = [torch.tensor([END_OF_TEXT_ID, *tokenizer.encode(text).ids]) for text in texts]
    nats = sum(held_out_nats(model, stream) for stream in streams)
    tokens = sum(len(stream) - 1 for stream in streams)
    text_bytes = sum(len(text.encode()) for text in texts)
    return HeldOutScore(loss=nats / tokens, bits_per_byte=nats / math.log(2) / text_bytes)


def train(
    model: DeepseekV3ForCausalLM,
    tokenizer: Tokenizer,
    corpus: Corpus,
    recipe: Recipe,
    budget: Budget,
    generator: torch.Generator,
) -> TrainingLog:
    """Train `model` in place until `budget` is used up."""
    optimizer = make_optimizer(model, recipe)
    balancer = RouterBalancer(model, recipe.router_bias_speed)
    text = TrainingText(list(corpus.train.values()), tokenizer, recipe, generator)
    log = TrainingLog()
    started = time.monotonic()
    next_score = 0.1
    columns = progress_columns("loss {task.fields[loss]:.3f}", "load {task.fields[load]:.2f}")
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("train", total=1.0, step=0, loss=math.nan, load=1.0)
        while (done := budget.done(log.steps, time.monotonic() - started)) < 1.0:
            batch = text.batch(recipe.finishing(done))
            loss = training_step(model, optimizer, batch, recipe, done)
            load = balancer.step()
            log.steps += 1
            log.tokens += batch.numel()
            known = not math.isnan(log.train_loss)
            log.train_loss = 0.98 * log.train_loss + 0.02 * loss if known else loss
            progress.update(bar, completed=done, step=log.steps, loss=log.train_loss, load=load)
            if done >= next_score:
                next_score += 0.1
                score = score_held_out(model, tokenizer, list(corpus.held_out.values()))
                log.held_out.append((log.steps, score))
                console.print(
                    f"step {log.steps}: training loss {log.train_loss:.3f}, held-out loss"
                    f" {score.loss:.3f}"
                )
        progress.update(bar, completed=1.0)
    log.seconds = time.monotonic() - started
    return log


def model_card(
    model: DeepseekV3ForCausalLM,
    corpus: Corpus,
    log: TrainingLog,
    score: HeldOutScore,
    samples: list[str],
    command: str,
) -> str:
    """The text of the model's README.md, with the numbers of this run."""
    config = model.config
    train_characters = sum(map(len, corpus.train.values()))
    held_out_characters = sum(map(len, corpus.held_out.values()))
    shown = "\n\n".join(f"```text\n{sample}\n```" for sample in samples)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
language: en
license: psf-2.0
---

# Demonstration model: DeepSeek-V3 architecture, {model.num_parameters() / 1e6:.1f} M parameters

A language model small enough for a repository, with the architecture of DeepSeek-V3: multi-head
latent attention, one dense layer, then mixture-of-experts layers with a shared expert and
group-limited routing. It writes text that looks like Python's documentation. It exists to try
tools on; it knows very little, has memorised part of its training text, and is no use for
anything else.

| | |
|---|---|
| parameters | {model.num_parameters():,} (word embeddings tied) |
| layers | {config.num_hidden_layers}, the first {config.first_k_dense_replace} dense |
| hidden size | {config.hidden_size} |
| attention | {config.num_attention_heads} heads; query rank {config.q_lora_rank}, key-value rank \
{config.kv_lora_rank}; head dims {config.qk_nope_head_dim} + {config.qk_rope_head_dim} rotary, \
value {config.v_head_dim} |
| experts | {config.n_routed_experts} routed in {config.n_group} groups, \
{config.num_experts_per_tok} a token from {config.topk_group} group, and \
{config.n_shared_experts} shared; width {config.moe_intermediate_size} |
| vocabulary | {config.vocab_size} byte-level BPE tokens |
| context | {config.max_position_embeddings} tokens |
| weights | float16; router balancing biases float32 |

## Training

Data: the documentation topics that ship with Python {platform.python_version()}, in
`pydoc_data.topics`; topics that are excerpts of longer ones are left out. Python's documentation
is under the PSF License Version 2, examples in it also under the Zero-Clause BSD License.

| | |
|---|---|
| training text | {len(corpus.train)} topics, {train_characters:,} characters |
| held-out text | {len(corpus.held_out)} topics, {held_out_characters:,} characters: \
{", ".join(sorted(corpus.held_out))} |

```bash
{command}
```

The routers' biases were trained by DeepSeek-V3's load-balancing rule. The held-out figures are of
the saved float16 weights, computed in float32.

| | |
|---|---|
| steps | {log.steps:,} |
| tokens | {log.tokens:,} |
| time | {log.seconds / 60:.1f} minutes on {torch.get_num_threads()} CPU threads |
| libraries | torch {torch.__version__}, transformers {transformers.__version__} |
| training loss at the end | {log.train_loss:.3f} nats per token |
| held-out loss | {score.loss:.3f} nats per token |
| held-out perplexity | {score.perplexity:.1f} per token |
| held-out bits per byte | {score.bits_per_byte:.3f} |

## Samples

Greedy decoding; each sample starts with its prompt.

{shown}
"""


def main(
    output: Annotated[Path, typer.Option(help="Directory to write the model to.")] = Path(
        "examples/demo_model"
    ),
    minutes: Annotated[float, typer.Option(min=0.1, help="Training time.")] = 25.0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Train for this many steps instead.")
    ] = None,
    vocab_size: Annotated[int, typer.Option(min=512, help="Tokens in the vocabulary.")] = 1536,
    seed: Annotated[int, typer.Option(help="Seed of the weights and the data order.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
) -> None:
    """Train the demonstration model, check it and write it as a Hugging Face directory."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    recipe = Recipe()

    corpus = load_corpus()
    tokenizer = train_tokenizer(list(corpus.train.values()), vocab_size)
    model = DeepseekV3ForCausalLM._from_config(
        model_config(tokenizer.get_vocab_size(), recipe.context),
        attn_implementation="eager",
        experts_implementation="eager",
    )
    console.print(
        f"{len(corpus.train)} topics, {sum(map(len, corpus.train.values())):,} characters;"
        f" {model.num_parameters():,} parameters"
    )
    log = train(model, tokenizer, corpus, recipe, Budget(steps, minutes), generator)
    save(model, tokenizer, output, eos_token=END_OF_TEXT, pad_token=PADDING)
    size = (output / "model.safetensors").stat().st_size
    if size > MAX_WEIGHTS_BYTES:
        raise SystemExit(f"model.safetensors has {size:,} bytes, over {MAX_WEIGHTS_BYTES:,}")

    held_out = list(corpus.held_out.values())
    model, tokenizer = load_checked(DeepseekV3ForCausalLM, output, held_out)
    score = score_held_out(model, tokenizer, held_out)
    samples = [generate(model, tokenizer, prompt) for prompt in SAMPLE_PROMPTS]
    command = shlex.join(["python", *sys.argv])
    card = model_card(model, corpus, log, score, samples, command)
    (output / "README.md").write_text(card, encoding="utf-8")
    console.print(f"held-out loss {score.loss:.3f}, perplexity {score.perplexity:.1f}")
    for sample in samples:
        console.rule()
        console.print(sample, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
