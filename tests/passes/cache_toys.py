"""One-layer decoders for the tests of the cache pass, carrying different things as exported."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from hal import descriptor
from hal.ir import Graph, State
from hal.passes._edit import all_values
from hal.runtime.verification import run_reference
from tests.passes.toys import Toy

HIDDEN, HEADS, SIZE = 32, 4, 8
RANK, ROPE, PAIR = 12, 4, 8
"""Channels of the latent, of the key that turns with the position, of each of two latents."""


def machine(balance: float | None) -> descriptor.Descriptor:
    """A chip that does ``balance`` operations per byte; None: nobody knows."""
    chip: dict[str, Any] = {"schema": 1, "name": "chip", "kind": "npu"}
    if balance is not None:
        figure = {"source": "test", "confidence": "vendor"}
        chip["peak"] = {"float32": {"value": balance, "unit": "Gflop/s", **figure}}
        chip["memory"] = [{"level": "dram", "bandwidth": {"value": 1, "unit": "GB/s", **figure}}]
    return descriptor.parse(chip)


class Decoder(Toy):
    """``x`` float32 [batch, sequence, HIDDEN] → ``y`` of the same shape, and carried state."""

    def __init__(self) -> None:
        super().__init__(x=["batch", "sequence", HIDDEN])
        self.states: list[State] = []
        self.hidden = self("LayerNormalization", self.x, self.weight(HIDDEN), axis=-1)

    def linear(self, x: ir.Value, width: int, *, inputs: int = HIDDEN, bias: bool = False) -> Any:
        made = self("MatMul", x, self.weight(inputs, width))
        return self("Add", made, self.weight(width)) if bias else made

    def heads(self, x: ir.Value, count: int, size: int) -> ir.Value:
        """``[batch, sequence, count * size]`` → ``[batch, count, sequence, size]``."""
        split = self("Reshape", x, np.array([0, 0, count, size]))
        return self("Transpose", split, perm=[0, 2, 1, 3])

    def past(self, kind: str, heads: int, size: int) -> ir.Value:
        return self.add_input(f"past.0.{kind}", ["batch", heads, "past", size])

    def appended(self, past: ir.Value, new: ir.Value) -> ir.Value:
        """Carry ``new``: the past with it behind, which is a state's output."""
        name = (past.name or "").removeprefix("past.")
        axes = ("batch", "head", "position", "channel")
        kind = name.split(".")[1]
        self.states.append(State(name, f"past.{name}", f"present.{name}", kind, axes, 2))
        return self("Concat", past, new, axis=2)

    def present(self, value: ir.Value) -> ir.Value:
        """Make the result of :meth:`appended` an output."""
        assert self.states
        self._outputs.append(value)
        return value

    def lengths(self, past: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Scalars: tokens before, and now."""
        before = self("Squeeze", self("Shape", past, start=2, end=3), np.array([0]))
        now = self("Squeeze", self("Shape", self.x, start=1, end=2), np.array([0]))
        return before, now

    def rotated(self, value: ir.Value, past: ir.Value, size: int) -> ir.Value:
        """Rotary embedding by the token's own position."""
        before, now = self.lengths(past)
        steps = self("Range", before, self("Add", before, now), np.int64(1))
        steps = self("Cast", steps, to=ir.DataType.FLOAT.value)
        rates = (10.0 ** -np.arange(size // 2)).astype(np.float32)
        angles = self("Mul", self("Unsqueeze", steps, np.array([1])), rates[None])
        shape = self("Concat", self("Shape", self.x, start=0, end=2), np.array([size // 2]), axis=0)
        angles = self("Expand", self("Unsqueeze", angles, np.array([0])), shape)
        return self("RotaryEmbedding", value, self("Cos", angles), self("Sin", angles))

    def attend(self, q: ir.Value, k: ir.Value, v: ir.Value, past: ir.Value, **more: Any) -> None:
        """Causal attention over keys and values of all tokens, projected to ``y``."""
        before, now = self.lengths(past)
        total = self("Add", before, now)
        rows = self("Unsqueeze", self("Range", before, total, np.int64(1)), np.array([1]))
        columns = self("Unsqueeze", self("Range", np.int64(0), total, np.int64(1)), np.array([0]))
        mask = self("Unsqueeze", self("LessOrEqual", columns, rows), np.array([0, 1]))
        out = self("Attention", q, k, v, mask, **more)
        joined = self("Transpose", out, perm=[0, 2, 1, 3])
        joined = self("Reshape", joined, np.array([0, 0, HEADS * SIZE]))
        self._outputs.insert(0, self.linear(joined, HIDDEN, inputs=HEADS * SIZE))
        self._outputs[0].name = "y"

    def graph(self) -> Graph:
        for state, value in zip(self.states, self._outputs[1:], strict=True):
            value.name = state.output
        made = super().graph()
        made.state = tuple(self.states)
        return made


def plain(
    *, kv_heads: int = HEADS, bias: bool = False, rope: bool = False, norm: bool = False,
    repeat: bool = False, **attributes: Any,
) -> Graph:  # fmt: skip
    """Keys and values straight from the hidden state.

    ``norm`` normalizes keys; ``repeat`` carries heads that were repeated for grouped queries.
    """
    t = Decoder()
    q = t.heads(t.linear(t.hidden, HEADS * SIZE, bias=bias), HEADS, SIZE)
    k = t.heads(t.linear(t.hidden, kv_heads * SIZE, bias=bias), kv_heads, SIZE)
    v = t.heads(t.linear(t.hidden, kv_heads * SIZE, bias=bias), kv_heads, SIZE)
    carried = HEADS if repeat else kv_heads
    past_k, past_v = t.past("key", carried, SIZE), t.past("value", carried, SIZE)
    if norm:
        k = t("RMSNormalization", k, t.weight(SIZE), axis=-1)
    if rope:
        q, k = t.rotated(q, past_k, SIZE), t.rotated(k, past_k, SIZE)
    if repeat:
        k, v = repeated(t, k, kv_heads), repeated(t, v, kv_heads)
    keys = t.present(t.appended(past_k, k))
    values = t.present(t.appended(past_v, v))
    t.attend(q, keys, values, past_k, **attributes)
    return t.graph()


def repeated(t: Decoder, x: ir.Value, kv_heads: int) -> ir.Value:
    """Each head as often as there are queries for it."""
    times = HEADS // kv_heads
    shape = t("Concat", t("Shape", t.x, start=0, end=1), np.array([kv_heads, times]),
              t("Shape", t.x, start=1, end=2), np.array([SIZE]), axis=0)  # fmt: skip
    wide = t("Expand", t("Unsqueeze", x, np.array([2])), shape)
    return t("Reshape", wide, np.array([0, HEADS, -1, SIZE]))


def latent(carries: str, *, bias: bool = False) -> Graph:
    """Keys and values from a small latent, and a key part with positions that all heads share.

    ``carries`` is what the exported model caches: ``operands``, or ``latent`` and rotated part.
    """
    t = Decoder()
    q = t.heads(t.linear(t.hidden, HEADS * (SIZE + ROPE)), HEADS, SIZE + ROPE)
    small = t("RMSNormalization", t.linear(t.hidden, RANK), t.weight(RANK), axis=-1)
    small = t("Reshape", small, np.array([0, 1, -1, RANK]))
    turning = t("Reshape", t.linear(t.hidden, ROPE), np.array([0, 1, -1, ROPE]))
    if carries == "operands":
        past_k, past_v = t.past("key", HEADS, SIZE + ROPE), t.past("value", HEADS, SIZE)
    else:
        past_k, past_v = t.past("key", 1, RANK), t.past("value", 1, ROPE)
    turning = t.rotated(turning, past_k, ROPE)
    fixed, turned = t("Split", q, np.array([SIZE, ROPE]), axis=3, outputs=2)
    q = t("Concat", fixed, t.rotated(turned, past_k, ROPE), axis=3)
    if carries == "latent":
        small = t.present(t.appended(past_k, small))
        turning = t.present(t.appended(past_v, turning))
    wide = t.linear(small, HEADS * 2 * SIZE, inputs=RANK, bias=bias)
    wide = t.heads(t("Squeeze", wide, np.array([1])), HEADS, 2 * SIZE)
    k, v = t("Split", wide, np.array([SIZE, SIZE]), axis=3, outputs=2)
    k = t("Concat", k, t("Expand", turning, np.array([1, HEADS, 1, 1])), axis=3)
    if carries == "operands":
        k, v = t.present(t.appended(past_k, k)), t.present(t.appended(past_v, v))
    t.attend(q, k, v, past_k)
    return t.graph()


def two_latents() -> Graph:
    """Keys from one latent, values from another; the exported model caches what attention reads."""
    t = Decoder()
    q = t.heads(t.linear(t.hidden, HEADS * SIZE), HEADS, SIZE)
    operands = []
    for _ in range(2):
        small = t("RMSNormalization", t.linear(t.hidden, PAIR), t.weight(PAIR), axis=-1)
        operands.append(t.heads(t.linear(small, HEADS * SIZE, inputs=PAIR), HEADS, SIZE))
    past_k, past_v = t.past("key", HEADS, SIZE), t.past("value", HEADS, SIZE)
    keys = t.present(t.appended(past_k, operands[0]))
    values = t.present(t.appended(past_v, operands[1]))
    t.attend(q, keys, values, past_k)
    return t.graph()


def in_half(graph: Graph) -> Graph:
    """The same decoder in float16."""
    half = ir.TensorType(ir.DataType.FLOAT16)
    for value in all_values(graph):
        if value.dtype is not ir.DataType.FLOAT:
            continue
        value.type = half
        if value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float16))
    return graph


def difference(
    before: Graph, after: Graph, lengths: tuple[int, ...] = (5, 1, 3, 1), dtype: str = "float32"
) -> float:
    """Largest difference of ``y`` over calls in a row, the state carried between them, batch 2."""
    rng = np.random.default_rng(0)
    steps = [{"x": rng.standard_normal((2, n, HIDDEN)).astype(dtype)} for n in lengths]
    pairs = zip(run_reference(before, steps), run_reference(after, steps), strict=True)
    return max(float(np.abs(a["y"].astype(float) - b["y"]).max()) for a, b in pairs)
