"""Lowering of growing state, against the graph before it, step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from hal.errors import InputError
from hal.ir import Graph, State
from hal.ir.cache_plan import RECENT, CachePlan, plan_of
from hal.ir.evaluate import Evaluator, evaluate
from hal.ir.inline import infer_types
from hal.passes.base import Pipeline
from hal.passes.cache_layout import CacheLayout
from hal.passes.default import clean_up
from hal.runtime.kv_store import CacheStore

AXES = ("batch", "head", "position", "channel")
IN, OUT = "int64[batch, sequence] ids, float[batch, 2, past, 8] pk", "float[batch, 2, total, 8] nk"
HEADER = '<ir_version: 13, opset_import: ["": 28]>'

POSITIONS = """
    length = Shape <start = 2, end = 3> (pk) axis0 = Constant <value_ints = [0]> ()
    start = Squeeze (length, axis0) zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> () new = Shape <start = 1, end = 2> (ids)
    count = Squeeze (new, axis0) steps = Range (zero, count, one) plain = Add (steps, start)
    extents = Shape (ids) positions = Expand (plain, extents)
"""
EMBED = """
    at = Cast <to = 1> (positions) word = Cast <to = 1> (ids) mixed = Mul (at, word)
    axes = Constant <value_ints = [1, 3]> () wide = Unsqueeze (mixed, axes)
    x = Mul (wide, weight) k = Sin (x) v = Cos (x)
    q = Concat <axis = 1> (k, v)
"""
FULL = """y, nk, nv = Attention <is_causal = 1, scale = 0.4> (q, k, v, , pk, pv)"""
LATENT = """
    first = Constant <value_ints = [0]> () last = Constant <value_ints = [6]> ()
    channels = Constant <value_ints = [3]> ()
    lv = Slice (k, first, last, channels) lpv = Slice (pk, first, last, channels)
    y, nk, unused = Attention <is_causal = 1, scale = 0.4, softcap = 3.0> (q, k, lv, , pk, lpv)
"""
FREE = """y, nk, nv = Attention <scale = 0.4> (q, k, v, , pk, pv)"""


def graph(attention: str, *, latent: bool = False, positions: str = POSITIONS) -> Graph:
    inputs = IN if latent else f"{IN}, float[batch, 2, past, 8] pv"
    outputs = OUT if latent else f"{OUT}, float[batch, 2, total, 8] nv"
    width = 6 if latent else 8
    model = onnx.parser.parse_model(
        f"{HEADER} g ({inputs}) => (float[batch, 4, sequence, {width}] y, {outputs})"
        f" {{ {positions} {EMBED} {attention} }}"
    )
    made = ir.serde.deserialize_model(model)
    weight = ir.tensor(
        np.random.default_rng(0).standard_normal((1, 2, 1, 8), np.float32), name="weight"
    )
    value = next(v for n in made.graph for v in n.inputs if v is not None and v.name == "weight")
    value.const_value, value.shape = weight, ir.Shape(weight.shape)
    value.type = ir.TensorType(ir.DataType.FLOAT)
    made.graph.register_initializer(value)
    infer_types(made)
    states = [State("key", "pk", "nk", "latent" if latent else "key", AXES, 2)]
    if not latent:
        states.append(State("value", "pv", "nv", "value", AXES, 2))
    return clean_up().run(Graph(made, tuple(states)))[0]


def lowered(source: Graph, layout: str = "contiguous", bits: int = 0) -> tuple[Graph, CachePlan]:
    made, _ = Pipeline("lower", (CacheLayout(layout, bits),)).run(source)
    plan = plan_of(made)
    assert plan is not None
    return made, plan


class Lowered:
    """A lowered graph on the reference evaluator, with its store."""

    def __init__(self, source: Graph, layout: str, bits: int, rows: int) -> None:
        made, self.plan = lowered(source, layout, bits)
        self.run = Evaluator(made)
        self.store = CacheStore(self.plan, page=4)
        self.rows = [self.store.add() for _ in range(rows)]

    def step(self, ids: np.ndarray, counts: Sequence[int] | None = None) -> np.ndarray:
        feeds = self.store.feeds(self.rows, ids.shape[1])
        outputs: Mapping[str, Any] = self.run({"ids": ids, **feeds})
        for out, source in self.plan.in_place().items():
            feeds[source][:] = outputs[out]
        self.store.advance(self.rows, counts or [ids.shape[1]] * len(self.rows))
        return np.asarray(outputs["y"])


def reference(source: Graph, steps: Sequence[np.ndarray]) -> list[np.ndarray]:
    batch, results = steps[0].shape[0], []
    state = {s.input: np.zeros((batch, 2, 0, 8), np.float32) for s in source.state}
    for ids in steps:
        outputs = evaluate(source, {"ids": ids, **state})
        state = {s.input: outputs[s.output] for s in source.state}
        results.append(outputs["y"])
    return results


def tokens(batch: int, *counts: int) -> list[np.ndarray]:
    rng = np.random.default_rng(batch)
    return [rng.integers(1, 9, (batch, n)) for n in counts]


@pytest.mark.parametrize("layout", ["contiguous", "paged"])
@pytest.mark.parametrize(("attention", "latent"), [(FULL, False), (LATENT, True)])
def test_steps_give_what_the_exported_graph_gives(
    layout: str, attention: str, latent: bool
) -> None:
    source = graph(attention, latent=latent)
    steps = tokens(2, 5, 1, 3, 1)
    mine = Lowered(source, layout, 0, 2)
    for ids, right in zip(steps, reference(source, steps), strict=True):
        np.testing.assert_allclose(mine.step(ids), right, atol=2e-6)


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.02), (4, 0.3)])
def test_quantized_caches_stay_near(bits: int, tolerance: float) -> None:
    source = graph(FULL)
    steps = tokens(1, RECENT + 20, 1, 1)
    mine = Lowered(source, "paged", bits, 1)
    for ids, right in zip(steps, reference(source, steps), strict=True):
        actual = mine.step(ids)
        assert 0 < np.abs(actual - right).max() < tolerance


def test_a_four_bit_cache_is_exact_while_all_positions_are_recent() -> None:
    source = graph(LATENT, latent=True)
    steps = tokens(2, 9, 1, 20, 1)
    mine = Lowered(source, "paged", 4, 2)
    for ids, right in zip(steps, reference(source, steps), strict=True):
        np.testing.assert_allclose(mine.step(ids), right, atol=2e-6)


@pytest.mark.parametrize("layout", ["contiguous", "paged"])
def test_a_trimmed_four_bit_cache_has_its_newest_positions_back(layout: str) -> None:
    source = graph(FULL)
    mine, straight = (Lowered(source, layout, 4, 1) for _ in range(2))
    first, second = tokens(1, 3 * RECENT, 40)
    for run in (mine, straight):
        run.step(first)
    mine.step(second)
    mine.store.trim(mine.rows[0], first.shape[1])
    after = [run.step(np.array([[4]])) for run in (mine, straight)]
    assert np.abs(after[0] - after[1]).max() < 0.05  # those that were forgotten are rounded


def test_rows_of_different_lengths_do_as_they_would_alone() -> None:
    source = graph(FULL)
    mine = Lowered(source, "contiguous", 0, 2)
    assert mine.plan.ragged
    ids, counts = tokens(2, 5)[0], [5, 2]
    first = mine.step(ids, counts)
    second = mine.step(np.array([[3], [4]]))
    for row, count in enumerate(counts):
        steps = [ids[row : row + 1, :count], np.array([[3], [4]])[row : row + 1]]
        right = reference(source, steps)
        np.testing.assert_allclose(first[row : row + 1, :, :count], right[0], atol=2e-6)
        np.testing.assert_allclose(second[row : row + 1], right[1], atol=2e-6)


def test_positions_that_all_rows_share_leave_rows_equal() -> None:
    shared = POSITIONS.replace(
        "positions = Expand (plain, extents)", "positions = Identity (plain)"
    )
    source = graph(FULL, positions=shared)
    mine = Lowered(source, "contiguous", 0, 2)
    assert not mine.plan.ragged
    steps = tokens(2, 4, 1)
    for ids, right in zip(steps, reference(source, steps), strict=True):
        np.testing.assert_allclose(mine.step(ids), right, atol=2e-6)


def test_nothing_that_grows_is_passed_by_value() -> None:
    made, plan = lowered(graph(FULL))
    assert made.state == ()
    assert {p.state for p in plan.pools} == {"key", "value"}
    assert plan.token_bytes() == 2 * 2 * 8 * 4
    assert not any(n.op_type in ("Concat", "Attention") and "pk" in str(n) for n in made.graph)
    inputs = {v.name for v in made.graph.inputs}
    assert inputs == {"ids", "hal.past", "hal.table.all", "pk", "pv"}


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_pools_take_fewer_bytes(bits: int) -> None:
    _, plan = lowered(graph(FULL), "paged", bits)
    assert plan.token_bytes() == 2 * 2 * (8 * bits // 8 + (2 if bits == 8 else 4))


def test_attention_that_is_not_causal_is_left_alone() -> None:
    source = graph(FREE)
    made, reports = Pipeline("lower", (CacheLayout(),)).run(source)
    assert reports[0].matches == 0
    assert plan_of(made) is None
    assert made.state == source.state


def test_an_odd_number_of_channels_has_no_four_bit_cache() -> None:
    source = graph(FULL)
    for value in source.graph.all_nodes():
        for x in value.outputs:
            if x.shape is not None and len(x.shape) == 4 and x.shape[3] == 8:
                x.shape = ir.Shape([*x.shape[:3], 7])
    with pytest.raises(InputError, match="even number of channels"):
        CacheLayout("paged", 4).run(source)
