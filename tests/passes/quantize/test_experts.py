from __future__ import annotations

import numpy as np

from hal.passes.quantize.experts import Routed, down_statistics, gate_up_statistics
from hal.passes.quantize.formats import parse_format
from hal.passes.quantize.gptq import gptq
from hal.passes.quantize.rtn import round_to_nearest

RNG = np.random.default_rng(2)
FORM = parse_format("w4-g32")


def routed(tokens: int = 800) -> Routed:
    """Tokens of two kinds; experts 0 and 1 get one kind each, expert 2 gets none."""
    kind = np.arange(tokens) % 2
    bases = RNG.standard_normal((2, 16, 64))
    x = np.stack([RNG.standard_normal(16) @ bases[k] for k in kind]).astype(np.float32)
    share = RNG.uniform(0.5, 1, (tokens, 1)).astype(np.float32)
    return Routed(x, x, kind[:, None], share)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def test_an_expert_is_rounded_for_the_tokens_that_choose_it() -> None:
    given = routed()
    weight = RNG.standard_normal((96, 64)).astype(np.float32)
    found = gptq(weight, FORM, gate_up_statistics(given, weight, 0)).dequantized()
    other = gptq(weight, FORM, gate_up_statistics(given, weight, 1)).dequantized()
    share, x, _ = given.of(0)
    own = np.linalg.norm(share * (x @ (weight - found).T))
    assert own < 0.8 * np.linalg.norm(share * (x @ (weight - other).T))


def test_the_second_matrix_sees_what_the_quantized_first_one_makes() -> None:
    given = routed()
    gate_up = RNG.standard_normal((128, 64)).astype(np.float32) * np.float32(0.1)
    rounded = round_to_nearest(gate_up, FORM).dequantized()
    down = RNG.standard_normal((64, 64)).astype(np.float32)
    statistics = down_statistics(given, down, 1, gate_up, rounded, "silu")
    assert statistics is not None
    found = gptq(down, FORM, statistics).dequantized()
    _, x, _ = given.of(1)

    def hidden(matrix: np.ndarray) -> np.ndarray:
        gate, up = np.split(x @ matrix.T, 2, axis=1)
        return silu(gate) * up

    right = hidden(gate_up) @ down.T
    plain = round_to_nearest(down, FORM).dequantized()
    error = np.linalg.norm(hidden(rounded) @ found.T - right)
    assert error < 0.9 * np.linalg.norm(hidden(rounded) @ plain.T - right)


def test_an_expert_that_no_token_chooses_has_no_statistics_of_its_own() -> None:
    given = routed()
    weight = RNG.standard_normal((96, 64)).astype(np.float32)
    assert np.isfinite(gate_up_statistics(given, weight, 2).gram).all()
    assert down_statistics(given, weight[:, :48], 2, weight, weight, "silu") is None
