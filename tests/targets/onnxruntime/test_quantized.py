"""Native kernels of quantized weights against the neutral graph's own meaning."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from hal.ir import Graph
from hal.ir.evaluate import evaluate
from hal.passes.base import Pipeline
from hal.passes.quantize import Quantize, parse_recipe
from hal.targets.onnxruntime.legalize import legalize
from hal.targets.onnxruntime.notes import weights_read
from tests.passes.quantize.toy import language_model
from tests.passes.toys import Toy
from tests.targets.onnxruntime.support import executable, parse

IDS = {"ids": np.arange(40).reshape(2, 20) % 96}
RECIPES = [
    "w8a16", "w8a16-channel", "w8a16-asym-g64", "w8a8", "w8a8-asym-g16,embedding=w4a16-asym",
    "w8a8-channel", "w4a16-channel,head=w4a16,embedding=w3a16", "w4a16-asym-g16", "w4a8-g64",
    "w3a16,head=w2a16-asym", "w3a16-asym-g64", "w3a8", "w2a16,embedding=w2a16", "w2a16-asym",
    "w2a8-asym", "w2a8-g16", "ternary-g64", "ternarya8",
    "mxfp4,head=mxfp4,embedding=mxfp4", "mxfp4a8",
]  # fmt: skip


def quantized(graph: Graph, recipe: str) -> Graph:
    return Pipeline("test", (Quantize(parse_recipe(recipe)),)).run(graph)[0]


def error(graph: Graph, folder: Path, given: dict[str, np.ndarray], output: str) -> float:
    right = evaluate(graph, given)[output]
    found = executable(graph, folder).run(given)[output]
    return float(np.abs(found - right).max() / np.abs(right).max())


@pytest.mark.parametrize("recipe", RECIPES)
def test_products_and_look_ups_read_the_codes(tmp_path: Path, recipe: str) -> None:
    graph = quantized(language_model(), recipe)
    counts = Counter(node.op_type for node in legalize(graph).graph)
    assert counts["DequantizeLinear"] == 0
    assert counts["MatMulNBits"] >= 3
    assert counts["GatherBlockQuantized"] == 1
    # a tie may be rounded to either side, so rounded activations get a little more room
    assert error(graph, tmp_path, IDS, "logits") < (0.02 if "a8" in recipe else 1e-5)


@pytest.mark.parametrize("recipe", ["fp8", "fp8-channel", "fp8-g64,embedding=w8a16"])
@pytest.mark.parametrize("tied", [True, False])
def test_floats_of_eight_bits_are_widened_for_products_and_looked_up_packed(
    tmp_path: Path, recipe: str, tied: bool
) -> None:
    graph = quantized(language_model(tied=tied), recipe)
    legal = legalize(graph)
    counts = Counter(node.op_type for node in legal.graph)
    assert counts["DequantizeLinear"] == 0
    assert counts["Transpose"] == 0
    floats = [v for v in legal.graph.initializers.values() if (v.name or "").endswith("/floats")]
    assert not floats
    assert any("8-bit float codes as floats" in text for text in weights_read(legal.model).notes)
    assert error(graph, tmp_path, IDS, "logits") < 1e-5


def test_floats_of_four_bits_say_what_they_are_stored_in() -> None:
    (text,) = weights_read(legalize(quantized(language_model(), "mxfp4a8,head=float")).model).notes
    assert "4-bit float codes in 8 bits" in text


def test_a_shorter_last_block_is_filled_with_zeros(tmp_path: Path) -> None:
    toy = Toy(x=["n", 72])
    toy.output(toy("MatMul", toy.x, toy.weight(72, 96)), "y")
    graph = quantized(toy.graph(), "w4a16-asym")
    assert "MatMulNBits" in {n.op_type for n in legalize(graph).graph}
    x = np.random.default_rng(0).standard_normal((3, 72)).astype(np.float32)
    assert error(graph, tmp_path, {"x": x}, "y") < 1e-5


@pytest.mark.parametrize(
    ("recipe", "native"),
    [("w4a16", True), ("fp8", False), ("mxfp4", False), ("w3a16", True), ("w2a16-g64", True), ("w8a16", True), ("ternary", True),
     ("w4a16-channel", True), ("w4a16,experts=w8a16-g32", False)],
)  # fmt: skip
def test_experts_stay_packed_where_the_kernel_keeps_the_activations(
    tmp_path: Path, recipe: str, native: bool
) -> None:
    rng = np.random.default_rng(0)
    graph = parse(
        "g (float[t, 64] x, float[t, 6] r, int64[1] k, int64[t, 2] i) => (float[t, 64] y)"
        "{ p = Softmax (r) w, chosen = TopK (p, k)"
        '  y = hal.MixtureOfExperts <activation = "silu"> (x, i, w, gate_up, down) }',
        gate_up=rng.standard_normal((6, 128, 64), np.float32),
        down=rng.standard_normal((6, 64, 64), np.float32),
    )
    graph = quantized(graph, recipe)
    assert ("QMoE" in {n.op_type for n in legalize(graph).graph}) == native
    given = {
        "x": rng.standard_normal((5, 64), np.float32),
        "r": rng.standard_normal((5, 6), np.float32),
        "k": np.array([2]),
        "i": np.stack([rng.permutation(6)[:2] for _ in range(5)]),
    }
    assert error(graph, tmp_path, given, "y") < 1e-5


def test_two_products_for_one_are_told() -> None:
    legal = legalize(quantized(language_model(), "w8a16"))
    (text,) = weights_read(legal.model).notes
    assert text.startswith("3 weights: 8-bit codes as two products of 4 bits")
    assert not weights_read(legalize(quantized(language_model(), "w8a8")).model).notes
