"""Teach the demonstration model to live with ternary weights: -1, 0 and 1 times a scale.

A model that was not trained for ternary weights loses much when they are rounded. A short
fine-tune wins most of it back: in every step the weights go through hal's own rounding, with its
blocks and scales, and gradients pass it as if it were not there (a straight-through estimator).
The float model is the teacher: its predictions are what is learned, so no labels are needed.

    python examples/train_ternary.py --output /tmp/ternary
    hal compile /tmp/ternary -o ternary.hal --target host:onnxruntime --quantize ternary

What is written is a Hugging Face directory whose weights are on the ternary grid already, so that
the rounding of `hal compile --quantize ternary` changes nothing.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from demo_text import END_OF_TEXT, END_OF_TEXT_ID, PADDING, TrainingText, load_corpus
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.nn.utils import parametrize
from train_demo_model import Recipe
from training import Budget, Schedule, make_optimizer, progress_columns, save, training_step
from transformers import AutoModelForCausalLM, PreTrainedModel

import hal
from hal.passes.quantize.formats import Format, parse_format
from hal.passes.quantize.rtn import round_to_nearest

MODEL = Path(__file__).parent / "demo_model"
FORMAT = "ternary"

console = Console()


@dataclass(frozen=True)
class Score:
    """How a model predicts held-out text, and how far it is from the float model."""

    perplexity: float
    kl: float

    def __str__(self) -> str:
        """Both figures."""
        return f"perplexity {self.perplexity:.2f}, KL to the float model {self.kl:.4f} nats"


class Ternary(torch.nn.Module):
    """A parametrization: a weight `[..., out, in]` as it is after hal's rounding to nearest."""

    def __init__(self, form: Format) -> None:
        """Round to `form`."""
        super().__init__()
        self._form = form

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The rounded weight; its gradient is that of `weight`."""
        matrix = weight.detach().reshape(-1, weight.shape[-1]).numpy()
        rounded = torch.from_numpy(round_to_nearest(matrix, self._form).dequantized())
        return weight + (rounded.view_as(weight) - weight).detach()


def ternary_layers(model: Path) -> list[str]:
    """The weights that `hal compile --quantize ternary` makes ternary, by hal's own report."""
    bundle = hal.compile(model, target="host:onnxruntime", quantize=FORMAT, verify=False)
    layers = bundle.manifest.metadata["quantization"]["layers"]
    named = [layer["name"] for layer in layers if layer["format"].startswith(FORMAT)]
    return [name.removeprefix("model.") for name in named]


def round_weights(model: PreTrainedModel, names: list[str]) -> None:
    """Let `model` compute with ternary weights from now on, and learn the floats behind them.

    `names` are modules with a `weight`, or parameters themselves.
    """
    form = parse_format(FORMAT)
    modules = dict(model.named_modules())
    for name in names:
        owner, _, own = (f"{name}.weight" if name in modules else name).rpartition(".")
        parametrize.register_parametrization(modules[owner], own, Ternary(form))


def keep_rounded(model: PreTrainedModel) -> None:
    """Replace the floats behind the ternary weights by what they were rounded to."""
    for module in model.modules():
        for name in list(getattr(module, "parametrizations", ())):
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)


@torch.no_grad()
def score(
    model: PreTrainedModel, teacher: PreTrainedModel, tokenizer: Tokenizer, texts: list[str]
) -> Score:
    """Predict each text from its own beginning, in windows of the longest sequence."""
    model.train(False)
    context, nats, kl, count = model.config.max_position_embeddings, 0.0, 0.0, 0
    for text in texts:
        ids = torch.tensor([END_OF_TEXT_ID, *tokenizer.encode(text).ids])
        for start in range(0, len(ids) - 1, context):
            window = ids[start : start + context + 1]
            with parametrize.cached():
                own = log_softmax(model(input_ids=window[None, :-1]).logits[0].float(), -1)
            theirs = log_softmax(teacher(input_ids=window[None, :-1]).logits[0].float(), -1)
            nats += float(cross_entropy(own, window[1:], reduction="sum"))
            kl += float(kl_div(own, theirs, reduction="sum", log_target=True))
            count += len(window) - 1
    return Score(math.exp(nats / count), kl / count)


def towards(
    teacher: PreTrainedModel, model: PreTrainedModel
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The loss of `model` on a batch: its KL divergence from the teacher, nats per token."""

    def loss(batch: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            theirs = log_softmax(teacher(input_ids=batch, use_cache=False).logits.float(), -1)
        with parametrize.cached():
            own = log_softmax(model(input_ids=batch, use_cache=False).logits.float(), -1)
        return kl_div(own.flatten(0, 1), theirs.flatten(0, 1), reduction="batchmean",
                      log_target=True)  # fmt: skip

    return loss


def load(folder: Path) -> PreTrainedModel:
    """A model in float32, experts computed one by one."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )


def train(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    text: TrainingText,
    budget: Budget,
    peak: float,
) -> int:
    """Fine-tune `model` in place until `budget` is used up; returns the steps made."""
    schedule = Schedule(peak_learning_rate=peak, weight_decay=0.0)
    optimizer, loss = make_optimizer(model, schedule), towards(teacher, model)
    steps, started, shown = 0, time.monotonic(), math.nan
    columns = progress_columns("KL {task.fields[kl]:.4f}")
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("train", total=1.0, step=0, kl=shown)
        while (done := budget.done(steps, time.monotonic() - started)) < 1.0:
            batch = text.batch(finishing=False)
            kl = training_step(model, optimizer, batch, schedule, done, loss)
            shown = kl if math.isnan(shown) else 0.95 * shown + 0.05 * kl
            steps += 1
            progress.update(bar, completed=done, step=steps, kl=shown)
        progress.update(bar, completed=1.0)
    return steps


def main(
    output: Annotated[Path, typer.Option(help="Directory to write the model to.")],
    model: Annotated[Path, typer.Option(help="Hugging Face directory to start from.")] = MODEL,
    minutes: Annotated[float, typer.Option(min=0.1, help="Training time.")] = 8.0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Train for this many steps instead.")
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="At the peak of the schedule.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Seed of the data order.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
) -> None:
    """Fine-tune the demonstration model for ternary weights and write it."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    corpus = load_corpus()
    held_out = list(corpus.held_out.values())
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    teacher, student = load(model), load(model)
    teacher.requires_grad_(False)
    names = ternary_layers(model)
    console.print(f"float: {score(teacher, teacher, tokenizer, held_out)}")
    round_weights(student, names)
    console.print(
        f"{FORMAT}, {len(names)} weights rounded: {score(student, teacher, tokenizer, held_out)}"
    )
    generator = torch.Generator().manual_seed(seed)
    text = TrainingText(list(corpus.train.values()), tokenizer, Recipe(), generator)
    done = train(student, teacher, text, Budget(steps, minutes), learning_rate)
    keep_rounded(student)
    save(student, tokenizer, output, eos_token=END_OF_TEXT, pad_token=PADDING)
    console.print(f"{FORMAT}, trained for {done} steps: "
                  f"{score(load(output), teacher, tokenizer, held_out)}")  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
