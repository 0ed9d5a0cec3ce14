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
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from tokenizers import Tokenizer
from transformers import (
    AutoTokenizer,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

SAMPLE_PROMPTS = ("The for statement", "Python", "A class definition ")

MAX_WEIGHTS_BYTES = 8_000_000

console = Console()


@dataclass(frozen=True)
class Recipe:
    """Every number that shapes the training run.

    Attributes:
        context: the model's longest sequence, in tokens.
        short_context: length of the training windows before the finish; short windows cost less
            attention.
        finish_fraction: last part of the run, on windows of the full `context` and on text
            encoded without dropout.
        batch_tokens: tokens in one optimiser step.
        peak_learning_rate: reached after the warm-up; a cosine then takes it down to
            `final_learning_rate_fraction` of itself.
        warmup_fraction: part of the run spent on the linear warm-up.
        weight_decay: AdamW's, on matrices only.
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
    peak_learning_rate: float = 3e-3
    final_learning_rate_fraction: float = 0.02
    warmup_fraction: float = 0.04
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    bpe_dropout: float = 0.1
    router_bias_speed: float = 1e-3

    def finishing(self, done: float) -> bool:
        """Whether the finish has begun when the part `done` of the run is behind us."""
        return done >= 1 - self.finish_fraction

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


@torch.no_grad()
def score_held_out(
    model: DeepseekV3ForCausalLM, tokenizer: Tokenizer, texts: list[str]
) -> HeldOutScore:
    """Predict each text from its own beginning, in windows of the model's longest sequence."""
    model.train(False)
    context = model.config.max_position_embeddings
    nats, tokens = 0.0, 0
    for text in texts:
        ids = torch.tensor([END_OF_TEXT_ID, *tokenizer.encode(text).ids])
        for start in range(0, len(ids) - 1, context):
            window = ids[start : start + context + 1]
            logits = model(input_ids=window[None, :-1]).logits[0].float()
            nats += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
            tokens += len(window) - 1
    text_bytes = sum(len(text.encode()) for text in texts)
    return HeldOutScore(loss=nats / tokens, bits_per_byte=nats / math.log(2) / text_bytes)


def make_optimizer(model: DeepseekV3ForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves normalisation weights alone."""
    matrices = [weight for weight in model.parameters() if weight.dim() >= 2]
    vectors = [weight for weight in model.parameters() if weight.dim() < 2]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=recipe.peak_learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )


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
    columns = (
        TextColumn("step {task.fields[step]}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  load {task.fields[load]:.2f}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("train", total=1.0, step=0, loss=math.nan, load=1.0)
        while (done := budget.done(log.steps, time.monotonic() - started)) < 1.0:
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate(done)
            model.train()
            batch = text.batch(recipe.finishing(done))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_clip)
            optimizer.step()
            optimizer.zero_grad()
            load = balancer.step()
            log.steps += 1
            log.tokens += batch.numel()
            known = not math.isnan(log.train_loss)
            log.train_loss = 0.98 * log.train_loss + 0.02 * loss.item() if known else loss.item()
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


def save(model: DeepseekV3ForCausalLM, tokenizer: Tokenizer, output: Path) -> None:
    """Write the Hugging Face directory, weights in float16.

    The routers' balancing biases stay in float32, as in the published DeepSeek-V3 weights.
    """
    output.mkdir(parents=True, exist_ok=True)
    for weight in model.parameters():
        weight.data = weight.data.to(torch.float16)
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    model.save_pretrained(output)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        model_max_length=model.config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(output)
    size = (output / "model.safetensors").stat().st_size
    if size > MAX_WEIGHTS_BYTES:
        raise SystemExit(f"model.safetensors has {size:,} bytes, over {MAX_WEIGHTS_BYTES:,}")


def load_checked(output: Path, corpus: Corpus) -> tuple[DeepseekV3ForCausalLM, Tokenizer]:
    """Load the saved directory as a user would, model in float32, and check the tokenizer.

    Raises:
        RuntimeError: `AutoTokenizer` and plain `tokenizers` disagree or lose characters.
    """
    model = DeepseekV3ForCausalLM.from_pretrained(output, dtype=torch.float32)
    wrapped = AutoTokenizer.from_pretrained(output)
    plain = Tokenizer.from_file(str(output / "tokenizer.json"))
    for text in (*corpus.held_out.values(), "  two spaces,\ttab\n\nand é ☃ \n"):
        ids = plain.encode(text).ids
        if wrapped(text, verbose=False)["input_ids"] != ids or wrapped.decode(ids) != text:
            raise RuntimeError("AutoTokenizer and tokenizers read the saved tokenizer differently")
        if plain.decode(ids) != text:
            raise RuntimeError("the saved tokenizer does not give back the text it encoded")
    return model, plain


def generate(
    model: DeepseekV3ForCausalLM, tokenizer: Tokenizer, prompt: str, new_tokens: int = 120
) -> str:
    """Continue `prompt` greedily; returns the prompt and its continuation."""
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    output = model.generate(ids, max_new_tokens=new_tokens, do_sample=False, use_cache=True)
    return str(tokenizer.decode(output[0].tolist()))


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
    save(model, tokenizer, output)

    model, tokenizer = load_checked(output, corpus)
    score = score_held_out(model, tokenizer, list(corpus.held_out.values()))
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
