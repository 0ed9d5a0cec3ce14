"""Kernels in one parallel region give what they give one by one."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")

import tvm
from tvm import relax

from hal.ir import Graph
from hal.targets.tvm.lower import lower
from hal.targets.tvm.lowering import Shaping
from hal.targets.tvm.pipeline import pipeline
from hal.targets.tvm.program import use_threads
from hal.targets.tvm.regions import _where_to_cut
from tests.passes.toys import Toy

LAYERS = 5
WIDTH = 256
X = np.random.default_rng(0).standard_normal((1, WIDTH)).astype(np.float32)


def layers(*, rows: int | str = 1, inside: int = 2 * WIDTH) -> Graph:
    """Serial and parallel kernels, each of which reads what the one before has written."""
    toy = Toy(x=[rows, WIDTH])
    stream = toy.x
    for _ in range(LAYERS):
        normal = toy("RMSNormalization", stream, np.ones(WIDTH, np.float32))
        inner = toy("Tanh", toy("MatMul", normal, toy.weight(WIDTH, inside)))
        stream = toy("Add", stream, toy("MatMul", inner, toy.weight(inside, WIDTH)))
    toy.output(toy("Sigmoid", stream), "y")
    return toy.graph()


def compiled(graph: Graph, step: str) -> tuple[Any, list[Any], str]:
    """What runs, its weights, and the instructions of its virtual machine."""
    target = tvm.target.Target("llvm")
    lowered = lower(graph, Shaping(lanes=8, cores=2))
    made = tvm.compile(lowered.module, target=target, relax_pipeline=pipeline(target, 8, step))
    weights = [tvm.runtime.tensor(np.asarray(v.const_value)) for v in lowered.weights]
    return relax.VirtualMachine(made, tvm.cpu()), weights, made.as_text()


def regions(text: str) -> list[str]:
    return re.findall(r"call +(region\w*)", text)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    "inside", [WIDTH, 2 * WIDTH]
)  # of one size: memory could be shared wrongly
def test_regions_give_the_same_bits_every_time(threads: int, inside: int) -> None:
    use_threads(threads)
    results = []
    for step in ("", "main"):
        machine, weights, text = compiled(layers(inside=inside), step)
        assert bool(regions(text)) == bool(step)
        for _ in range(100 if step else 1):
            found = machine["main"](tvm.runtime.tensor(X), *weights)[0].numpy()
            results.append(found)
    use_threads(None)
    for found in results[1:]:
        np.testing.assert_array_equal(found, results[0])


def test_layers_that_are_alike_share_their_code() -> None:
    calls = regions(compiled(layers(), "main")[2])
    assert len(calls) >= LAYERS
    assert len(set(calls)) <= 3


def test_what_has_no_region_stays_as_it_is() -> None:
    """Rows that are not known make loops whose length is not known: still the same results."""
    one, weights, _ = compiled(layers(rows="batch"), "main")
    two, others, _ = compiled(layers(rows="batch"), "")
    several = np.concatenate([X, 2 * X, -X])
    found = one["main"](tvm.runtime.tensor(several), *weights)[0].numpy()
    expected = two["main"](tvm.runtime.tensor(several), *others)[0].numpy()
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("kernels", "cut"),
    [
        ("a b c d e c d e c d e f", "c"),
        ("a b c", None),
        ("g n m m a n m m a n m m a h", "n"),
        ("", None),
    ],
)
def test_regions_end_where_layers_do(kernels: str, cut: str | None) -> None:
    assert _where_to_cut(kernels.split()) == cut
