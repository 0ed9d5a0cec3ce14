"""Contenders on a language model: hal's recipes, and ONNX Runtime's quantizer on the same graph.

A contender is a function from windows of tokens to logits; :class:`Scorer` compares it with the
float graph. Everything here runs in this process; :mod:`quantization_peers` has those that do not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnxruntime.quantization import matmul_nbits_quantizer as nbits
from onnxruntime.quantization.neural_compressor import gptq_quantize

from hal import frontends
from hal.ir.evaluate import Evaluator
from hal.passes import default_pipeline
from hal.passes.base import Pipeline
from hal.passes.quantize import METADATA_KEY, Quantize, find_layers, parse_recipe
from hal.passes.quantize.calibration import Calibration
from hal.runtime.scoring import TextTally
from hal.targets.onnxruntime.legalize import legalize

WINDOW = 256

Done = Collection[tuple[str, str, str]]
"""Who, format and method of rows that an earlier run has left."""

LogitsOf = Callable[[np.ndarray], np.ndarray]
"""Token ids int64 ``[rows, WINDOW]`` to logits ``[rows, WINDOW, vocab]``."""


@dataclasses.dataclass(frozen=True)
class Made:
    """A quantized model: by whom, how, bits for each weight, and seconds that making it took."""

    who: str
    format: str
    method: str
    bits: float
    seconds: float
    logits: LogitsOf


@dataclasses.dataclass(frozen=True)
class Row:
    """A contender's figures; or why there are none."""

    who: str
    format: str
    method: str
    bits: float = 0.0
    kl: float = 0.0
    kl_low: float | None = None
    kl_high: float | None = None
    top1: float = 0.0
    perplexity: float = 0.0
    seconds: float = 0.0
    note: str = ""


class Subject:
    """The float model, its held-out windows, and the tokens to calibrate on."""

    def __init__(self, path: Path, tokens: int, calibration: int) -> None:
        self.path = path
        self.graph = default_pipeline().run(frontends.load(path).graph)[0]
        held_out = np.load(path / "heldout.npy").reshape(-1).astype(np.int64)
        rows = min(tokens, len(held_out) - 1) // WINDOW
        self.windows = held_out[: rows * WINDOW].reshape(-1, WINDOW)
        self.goals = held_out[1 : rows * WINDOW + 1].reshape(-1, WINDOW)
        text = np.load(path / "calibration.npy").reshape(-1).astype(np.int64)
        self.calibration = text[: calibration // WINDOW * WINDOW].reshape(-1, WINDOW)
        self.data = Calibration.from_tokens(self.graph, self.calibration)
        self.layers = [x for x in find_layers(self.graph) if x.kind == "linear"]
        self._evaluator = Evaluator(self.graph, ["logits"])
        self.reference = self.with_matrices({})(self.windows)

    def matrices(self) -> dict[str, np.ndarray]:
        """The linear layers' weights by name, float32 ``[out, in]``."""
        return {x.name: np.asarray(x.matrix(_array(x.weight)), np.float32) for x in self.layers}

    def squares(self) -> dict[str, np.ndarray]:
        """The mean square of each layer's inputs on the calibration tokens, ``[in]``."""
        inputs = {x.name: x.products[0].inputs[0].name for x in self.layers}
        evaluator = Evaluator(self.graph, sorted(set(inputs.values())))
        found = []
        for sample in self.data.samples:
            values = evaluator(sample)
            found.append({k: np.square(v).mean((0, 1)) for k, v in values.items()})
        return {k: np.mean([f[v] for f in found], axis=0) for k, v in inputs.items()}

    def with_matrices(self, matrices: dict[str, np.ndarray]) -> LogitsOf:
        """The float graph with other weights in its linear layers."""
        layers = {x.name: x for x in self.layers}
        weights = {
            layers[k].weight.name: layers[k].stored(np.asarray(m, np.float32))
            for k, m in matrices.items()
        }
        return self.each(lambda feeds: self._evaluator(feeds, weights)["logits"])

    def each(self, run: Callable[[Any], Any]) -> LogitsOf:
        """``run`` on windows, some at a time."""

        def logits(windows: np.ndarray) -> np.ndarray:
            samples = Calibration.from_tokens(self.graph, windows).samples
            return np.concatenate([np.asarray(run(dict(s)), np.float32) for s in samples])

        return logits

    def score(self, made: Made) -> Row:
        """Figures beside the float graph."""
        logits = made.logits(self.windows)
        tally = TextTally()
        for goal, ours, theirs in zip(self.goals, logits, self.reference, strict=True):
            tally.add(goal, ours, theirs)
        found = tally.score().comparison
        assert found is not None
        kl = found.kl_divergence
        return Row(
            made.who, made.format, made.method, round(made.bits, 4), kl.value, kl.low, kl.high,
            found.top1_agreement.value, found.perplexity_ratio.value, round(made.seconds, 1),
        )  # fmt: skip


def _array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy()


def ours(subject: Subject, recipes: Sequence[str], done: Done = ()) -> Iterator[Made]:
    """hal's recipes on the linear layers; embedding and head stay floats."""
    for text in recipes:
        name, _, method = text.partition(":")
        if ("hal", name, method) in done:
            continue
        start = time.perf_counter()
        recipe = parse_recipe(f"{text},head=float,embedding=float")
        step = Quantize(recipe, calibration=subject.data)
        made = Pipeline("benchmark", (step,)).run(subject.graph)[0]
        seconds = time.perf_counter() - start
        layers = [x for x in made.metadata[METADATA_KEY]["layers"] if x["format"] != "float"]
        bits = sum(x["bits"] * x["weights"] for x in layers) / sum(x["weights"] for x in layers)
        evaluator = Evaluator(made, ["logits"])
        run = subject.each(lambda feeds, e=evaluator: e(feeds)["logits"])
        yield Made("hal", name, method, bits, seconds, run)


NBITS = (
    (8, 32, True, "rtn"), (4, 32, True, "rtn"), (4, 32, False, "rtn"), (4, 32, False, "hqq"),
    (4, 32, False, "k_quant"), (4, 32, True, "gptq"), (4, 32, False, "gptq"), (4, 64, True, "rtn"),
    (4, 64, False, "rtn"), (4, 64, False, "hqq"),
    (2, 32, False, "rtn"), (2, 32, False, "hqq"), (2, 64, False, "rtn"), (2, 64, False, "hqq"),
)  # fmt: skip
"""Bits, block, symmetric, method: what ONNX Runtime's MatMulNBits quantizer offers."""


def onnxruntime_quantizer(subject: Subject, done: Done = ()) -> Iterator[Made]:
    """What ONNX Runtime's MatMulNBits quantizer makes of the graph; its scales are float32."""
    legal = legalize(subject.graph)
    model = ir.to_proto(legal.model)
    layers = find_layers(legal)
    weights = {x.weight.name for x in layers if x.kind == "linear"}
    heads = [n.name for x in layers if x.kind == "head" for n in x.products]
    for bits, block, symmetric, method in NBITS:
        name = f"{bits} bits-g{block}-{'sym' if symmetric else 'asym'}"
        if ("onnxruntime", name, method) in done:
            continue
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        start = time.perf_counter()
        made = matmul_nbits(copy, bits, block, symmetric, method, heads, subject.data.samples)
        seconds = time.perf_counter() - start
        size = stored_bits(made, model, weights)
        run = subject.each(_session(made))
        yield Made("onnxruntime", name, method, size, seconds, run)


def matmul_nbits(
    model: onnx.ModelProto, bits: int, block: int, symmetric: bool, method: str,
    heads: Sequence[Any], samples: Sequence[Any],
) -> onnx.ModelProto:  # fmt: skip
    """``model`` with the products that are not named in ``heads`` in few bits."""
    if method == "gptq":
        # The quantizer itself would quantize the head too: it passes no exclusions on to GPTQ.
        with contextlib.redirect_stdout(io.StringIO()):
            return gptq_quantize(
                model, [(dict(s), None) for s in samples], dict.fromkeys(heads, "fp32"),
                num_bits=bits, group_size=block, scheme="sym" if symmetric else "asym",
                n_samples=-1,
            ).model  # fmt: skip
    config: Any = nbits.DefaultWeightOnlyQuantConfig(
        block_size=block, is_symmetric=symmetric, bits=bits
    )
    if method == "hqq":
        config = nbits.HQQWeightOnlyQuantConfig(block_size=block, bits=bits)
    elif method == "k_quant":
        config = nbits.KQuantWeightOnlyQuantConfig()
    quantizer = nbits.MatMulNBitsQuantizer(
        model, bits=bits, block_size=block, is_symmetric=symmetric,
        nodes_to_exclude=list(heads), algo_config=config,
    )  # fmt: skip
    quantizer.process()
    return quantizer.model.model


def _session(model: onnx.ModelProto) -> Callable[[Any], Any]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda feeds: session.run(["logits"], feeds)[0]


def stored_bits(made: onnx.ModelProto, before: onnx.ModelProto, weights: set[str | None]) -> float:
    """Bits for each weight of the quantized layers in ``made``, scales and zero points included."""
    old = {t.name for t in before.graph.initializer}
    new = [t for t in made.graph.initializer if t.name not in old]
    count = sum(int(np.prod(t.dims)) for t in before.graph.initializer if t.name in weights)
    return 8 * sum(onnx.numpy_helper.to_array(t).nbytes for t in new) / count
