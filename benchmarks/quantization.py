"""What each format and method costs in accuracy, beside ONNX Runtime's own quantizer.

::

    python examples/train_reference_model.py            # once; it takes an hour and is cached
    python benchmarks/quantization.py --model ~/.cache/hal/models/reference --json results.json

Every row is the same float graph with the weights of its linear layers (not embedding and head) in
few bits, on the same held-out tokens. Bits per weight are those of these layers as they are stored,
scales and zero points included. ONNX Runtime's quantizer gets the same graph as its own model; it
keeps scales in float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnxruntime.quantization import matmul_nbits_quantizer as peer
from rich.console import Console
from rich.table import Table

from hal import frontends
from hal.ir import Graph
from hal.ir.evaluate import Evaluator
from hal.passes import default_pipeline
from hal.passes.base import Pipeline
from hal.passes.quantize import METADATA_KEY, Quantize, find_layers, parse_recipe
from hal.passes.quantize.calibration import Calibration
from hal.runtime.scoring import Recorded, score_text
from hal.targets.onnxruntime.legalize import legalize

WINDOW = 256


@dataclasses.dataclass(frozen=True)
class Row:
    """One contender's figures; ``seconds`` is what quantizing took."""

    who: str
    format: str
    bits: float
    kl: float
    kl_low: float | None
    kl_high: float | None
    top1: float
    perplexity: float
    seconds: float


class Model:
    """Anything that maps feeds to logits, as :func:`score_text` wants it."""

    def __init__(self, run: Callable[[dict[str, np.ndarray]], np.ndarray], graph: Graph) -> None:
        self._run, self._graph = run, graph

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits ``[len(ids), vocab]``, nothing seen before."""
        sample = dict(Calibration.from_tokens(self._graph, np.asarray(ids)[None]).samples[0])
        return self._run(sample)[0]


def neutral(graph: Graph) -> Model:
    """The graph as its reference evaluator runs it."""
    evaluator = Evaluator(graph, ["logits"])
    return Model(lambda feeds: np.asarray(evaluator(feeds)["logits"], np.float32), graph)


def runtime(proto: onnx.ModelProto, graph: Graph) -> Model:
    """A model as ONNX Runtime runs it."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return Model(lambda feeds: session.run(["logits"], feeds)[0], graph)


def ours(graph: Graph, recipes: list[str], data: Calibration) -> Iterator[tuple[Any, ...]]:
    """Contenders of hal: name, format, bits, model, seconds."""
    for text in recipes:
        start = time.perf_counter()
        recipe = parse_recipe(f"{text},head=float,embedding=float")
        step = Quantize(recipe, calibration=data)
        made = Pipeline("benchmark", (step,)).run(graph)[0]
        seconds = time.perf_counter() - start
        layers = [x for x in made.metadata[METADATA_KEY]["layers"] if x["format"] != "float"]
        bits = sum(x["bits"] * x["weights"] for x in layers) / sum(x["weights"] for x in layers)
        name, _, method = text.partition(":")
        yield f"hal {method or 'rtn'}", name, bits, neutral(made), seconds


def theirs(graph: Graph) -> Iterator[tuple[Any, ...]]:
    """Contenders of ONNX Runtime's MatMulNBits quantizer."""
    legal = legalize(graph)
    model = ir.to_proto(legal.model)
    heads = [n.name for layer in find_layers(legal) if layer.kind == "head" for n in layer.products]
    weights = {layer.weight.name for layer in find_layers(legal) if layer.kind == "linear"}
    for bits, group, symmetric, method in PEERS:
        config: Any = peer.DefaultWeightOnlyQuantConfig(
            block_size=group, is_symmetric=symmetric, bits=bits
        )
        if method == "hqq":
            config = peer.HQQWeightOnlyQuantConfig(block_size=group, bits=bits)
        elif method == "k_quant":
            config = peer.KQuantWeightOnlyQuantConfig()
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        start = time.perf_counter()
        quantizer = peer.MatMulNBitsQuantizer(
            copy,
            bits=bits,
            block_size=group,
            is_symmetric=symmetric,
            nodes_to_exclude=heads,
            algo_config=config,
        )
        quantizer.process()
        made = quantizer.model.model
        seconds = time.perf_counter() - start
        size, count = stored(made, model, weights)
        kind = "" if symmetric else "-asym"
        name = f"w{bits}a16-g{group}{kind}"
        yield f"onnxruntime {method}", name, 8 * size / count, runtime(made, graph), seconds


PEERS = [
    (8, 32, True, "rtn"),
    (4, 32, True, "rtn"),
    (4, 32, False, "rtn"),
    (4, 32, False, "hqq"),
    (4, 32, False, "k_quant"),
    (2, 32, False, "rtn"),
    (2, 32, False, "hqq"),
]
"""Bits, block, symmetric, method: what the quantizer offers with blocks of 32."""


def stored(
    made: onnx.ModelProto, before: onnx.ModelProto, weights: set[str | None]
) -> tuple[int, int]:
    """Bytes of the quantized layers in ``made``, and how many weights they have."""
    old = {t.name for t in before.graph.initializer}
    new = [t for t in made.graph.initializer if t.name not in old]
    count = sum(int(np.prod(t.dims)) for t in before.graph.initializer if t.name in weights)
    return sum(onnx.numpy_helper.to_array(t).nbytes for t in new), count


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face directory")
    parser.add_argument("--tokens", type=int, default=8192, help="held-out tokens to score")
    parser.add_argument("--calibration", type=int, default=16384, help="tokens to calibrate on")
    parser.add_argument("--recipes", default=RECIPES, help="separated by commas")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console()
    with console.status("exporting the model"):
        graph = frontends.load(options.model).graph
        graph = default_pipeline().run(graph)[0]
    held_out = np.load(options.model / "heldout.npy").reshape(-1)[: options.tokens]
    text = np.load(options.model / "calibration.npy").reshape(-1)[: options.calibration]
    data = Calibration.from_tokens(graph, text[: len(text) // WINDOW * WINDOW].reshape(-1, WINDOW))
    reference = Recorded(neutral(graph))
    contenders = [ours(graph, options.recipes.split(","), data)]
    if not options.no_peers:
        contenders.append(theirs(graph))
    rows = []
    for source in contenders:
        for who, name, bits, model, seconds in source:
            score = score_text(model, held_out, window=WINDOW, against=reference)
            found = score.comparison
            assert found is not None
            rows.append(
                Row(
                    who,
                    name,
                    round(bits, 3),
                    found.kl_divergence.value,
                    found.kl_divergence.low,
                    found.kl_divergence.high,
                    found.top1_agreement.value,
                    found.perplexity_ratio.value,
                    round(seconds, 1),
                )
            )
            console.print(f"{who} {name}: KL {rows[-1].kl:.3g}")
    _print(console, rows)
    if options.json:
        facts = {
            "model": options.model.name,
            "tokens": len(held_out),
            "calibration": text.size,
            "onnxruntime": ort.__version__,
            "rows": [dataclasses.asdict(r) for r in rows],
        }
        options.json.write_text(json.dumps(facts, indent=1))


RECIPES = ",".join(
    f"{form}:{method}"
    for form in ("w8a16", "w8a8", "w4a16", "w4a16-asym", "w4a8", "w3a16", "w2a16", "ternary")
    for method in ("rtn", "hqq", "gptq")
)
"""Every format with every method."""


def _print(console: Console, rows: list[Row]) -> None:
    table = Table("format", "by", "bits", "KL, nats (95 %)", "top-1", "perplexity", "s")
    for row in sorted(rows, key=lambda r: (-r.bits // 0.5, r.kl)):
        interval = "" if row.kl_low is None else f" ({row.kl_low:.3g} to {row.kl_high:.3g})"
        table.add_row(
            row.format,
            row.who,
            f"{row.bits:.2f}",
            f"{row.kl:.3g}{interval}",
            f"{row.top1:.2%}",
            f"{row.perplexity:.4f}x",
            f"{row.seconds:.1f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
