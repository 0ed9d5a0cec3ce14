from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hal.ir import Graph
from hal.ir.evaluate import evaluate
from hal.targets.onnxruntime.legalize import legalize
from tests.targets.onnxruntime.support import executable, parse

SIGNATURE = "g (float[t, 16] x, float[t, 6] r, int64[1] k, int64[t, 2] i) => (float[t, 16] y)"
ROUTED = """{ p = Softmax (r) w, chosen = TopK (p, k)
    y = hal.MixtureOfExperts <activation = "%s"> (x, i, w, gate_up, down) }"""
UNPROVED = """{ w, chosen = TopK (r, k)
    y = hal.MixtureOfExperts <activation = "silu"> (x, i, w, gate_up, down) }"""


def graph(body: str = ROUTED % "silu") -> Graph:
    rng = np.random.default_rng(0)
    return parse(
        SIGNATURE + body,
        gate_up=rng.standard_normal((6, 16, 16), np.float32),
        down=rng.standard_normal((6, 16, 8), np.float32),
    )


def feeds(tokens: int, index: list[int] | None = None) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(tokens)
    chosen = np.stack([rng.permutation(6)[:2] for _ in range(tokens)]) if index is None else None
    return {
        "x": rng.standard_normal((tokens, 16), np.float32),
        "r": rng.standard_normal((tokens, 6), np.float32),
        "k": np.array([2]),
        "i": np.array([index] * tokens) if chosen is None else chosen,
    }


def ops(made: Graph) -> set[str]:
    return {node.op_type for node in legalize(made).graph}


@pytest.mark.parametrize("tokens", [1, 7])
def test_the_fused_kernel_equals_the_body(tmp_path: Path, tokens: int) -> None:
    made = graph()
    assert "MoE" in ops(made)
    given = feeds(tokens)
    expected = evaluate(made, given)["y"]
    actual = executable(made, tmp_path).run(given)["y"]
    assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("index", [[3, 3], [1, 6], [-1, 9]])
def test_repeated_and_absent_experts_keep_their_meaning(tmp_path: Path, index: list[int]) -> None:
    made = graph()
    given = feeds(4, index)
    expected = evaluate(made, given)["y"]
    actual = executable(made, tmp_path).run(given)["y"]
    assert np.abs(actual - expected).max() <= 1e-5 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("body", [UNPROVED, ROUTED % "gelu"])
def test_what_the_kernel_cannot_do_exactly_uses_the_body(tmp_path: Path, body: str) -> None:
    made = graph(body)
    assert "MoE" not in ops(made)
    given = feeds(5)
    actual = executable(made, tmp_path).run(given)["y"]
    assert np.allclose(actual, evaluate(made, given)["y"], rtol=1e-4, atol=1e-5)


def test_the_weights_are_repacked_once_and_the_old_ones_dropped() -> None:
    names = set(legalize(graph()).graph.initializers)
    assert names == {"gate_up/interleaved", "down"}
