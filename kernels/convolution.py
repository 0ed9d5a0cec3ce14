"""Convolution of float32 maps over one or two axes, as sums over shifted rows of the input.

A task computes blocks of output channels over runs of neighbouring outputs. The sums of a block
stay in registers: ``height`` channels times ``wide`` vectors of outputs. For each input channel and
tap of the window it loads the vectors once, multiplies them with ``height`` weights that are
broadcast, and stores sums, with bias, residual and limits, where they belong.

Vectors are contiguous, so the input is *arranged* first where it has borders or strides: into
planes, one for each phase of the stride, with the borders as zeros. Short rows get a plane for each
column of the window instead, in which rows follow one another without a gap, so that vectors may
span them. What is left of a run is done by a vector that lies over the one before, or, where it is
little, by vectors of channels for one output each: no masks.

Roofline: ``2 * height * wide`` operations on ``height + wide`` loads a tap. Of the blocks whose
sums and operands fit the registers, the one with the least work is taken, idle lanes and channels
counted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T  # noqa: N812

from hal.kernels.arrange import arrange_channel
from hal.kernels.convolution_plan import IN_FLIGHT, Plan
from hal.kernels.emitting import ATTRIBUTES, i64, vector
from hal.kernels.vectors import span, spread

_NEAR_BYTES = 1 << 18
"""What a task reads of the input for one block of channels, so that the next finds it near."""

_TASKS_PER_CORE = 4


_Place = tuple[Any, Any, Any, list[Any], tuple[Any, Any, Any]]
"""Image, block, run, where the input is (row and first channel), and :func:`_channels`."""


@functools.lru_cache(maxsize=256)
def convolution(
    made: Plan,
    cores: int,
    *,
    bias: bool = True,
    residual: bool = False,
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """``out = min(max(conv(z, w) + bias + residual, low), high)``; float32.

    ``z[B, channels, extent]`` is arranged, ``w`` is packed, ``bias[outputs]``; residual and out are
    ``[B, outputs, height * width]``. Parameters that are switched off are left out. Where the plan
    says :attr:`Plan.alone`, ``z`` is the input ``[B, channels, height, width]`` itself, and a last
    result is room for :func:`tasks` channels of each image, ``[B * tasks, 1, extent]``.
    """
    g = made.geometry
    blocks, terms, height = made.packed_shape
    pixels = g.out[0] * g.out[1]
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("convolution")
        given = {"bias": bias, "residual": residual}
        names = ["z", "w", *(name for name, there in given.items() if there), "out"]
        results = ["out", *(["room"] if made.alone else [])]
        names += results[1:]
        handles = {name: T.arg(name, T.handle()) for name in names}
        T.func_attr(ATTRIBUTES)
        batch = tirx.Var("batch", "int64")
        maps = (batch, g.outputs, pixels)
        shapes: dict[str, tuple[Any, ...]] = {
            "z": (batch, g.channels, *(g.size if made.alone else [made.arranged.extent])),
            "w": (blocks, terms, height),
            "bias": (g.outputs,),
            "residual": maps,
            "out": maps,
            "room": (batch * i64(tasks(made, cores)), 1, made.arranged.extent),
        }
        buffers = {n: T.match_buffer(handles[n], shapes[n], "float32") for n in names}
        with T.sblock("root"):
            whole = {n: b[tuple(slice(0, d) for d in shapes[n])] for n, b in buffers.items()}
            T.reads([whole[n] for n in names if n not in results])
            T.writes([whole[n] for n in results])
            _tasks(made, cores, buffers, batch, (low, high))
    return builder.get()


def tasks(made: Plan, cores: int) -> int:
    """How many tasks an image is cut into."""
    runs, share = _shares(made, cores)
    return -(-made.arranged.runs // runs) * -(-made.packed_shape[0] // share)


def _shares(made: Plan, cores: int) -> tuple[int, int]:
    """Runs and blocks of a task."""
    blocks, to = made.packed_shape[0], made.arranged
    near = max(_NEAR_BYTES // (4 * made.geometry.depth * to.step), 1)
    runs = to.runs if made.alone else min(near, to.runs)
    run_tasks = -(-to.runs // runs)
    return runs, -(-blocks // min(-(-_TASKS_PER_CORE * cores // run_tasks), blocks))


def _tasks(
    made: Plan,
    cores: int,
    buffers: dict[str, Any],
    batch: Any,
    limits: tuple[float | None, float | None],
) -> None:
    to, blocks = made.arranged, made.packed_shape[0]
    runs, share = _shares(made, cores)
    block_tasks, count = -(-blocks // share), tasks(made, cores)
    full, starts = _tiles(made)
    with T.parallel(batch * i64(count)) as task:
        image = T.Bind(tirx.floordiv(task, i64(count)))
        rest = T.Bind(tirx.floormod(task, i64(count)))
        first_run = T.Bind(tirx.floordiv(rest, i64(block_tasks)) * i64(runs))
        first = T.Bind(tirx.floormod(rest, i64(block_tasks)) * i64(share))
        size = (made.height * made.wide,)
        sums = T.alloc_buffer(size, vector("float32", made.lanes), scope="local")
        with T.serial(first, tirx.min(first + i64(share), i64(blocks))) as block:
            at = _channels(made, block)
            source = [image, at[0]]
            if made.alone:
                source = [task, i64(0)]
                arrange_channel(made, buffers["z"], buffers["room"], [image, at[0]], source)
            with T.serial(first_run, tirx.min(first_run + i64(runs), i64(to.runs))) as run:
                here = (image, block, run, source, at)
                if full:
                    with T.serial(i64(0), i64(full)) as t:
                        before = T.Bind(t * i64(made.wide * made.lanes))
                        places = [before + i64(j * made.lanes) for j in range(made.wide)]
                        _tile(made, buffers, sums, here, places, limits)
                if starts:
                    _tile(made, buffers, sums, here, [i64(s) for s in starts], limits)
                if made.corner:
                    _corner(made, buffers, here, limits)


def _tiles(made: Plan) -> tuple[int, list[int]]:
    """How many tiles of a run are whole, and where the vectors of what is left start."""
    length, lanes = made.arranged.length - made.corner, made.lanes
    vectors = -(-length // lanes)
    whole = length // lanes // made.wide
    return whole, [min(v * lanes, length - lanes) for v in range(whole * made.wide, vectors)]


def _tile(
    made: Plan,
    buffers: dict[str, Any],
    sums: Any,
    at: _Place,
    places: list[Any],
    limits: tuple[float | None, float | None],
) -> None:
    """``height`` channels times the vectors that start at ``places`` in a run."""
    g, to, lanes = made.geometry, made.arranged, made.lanes
    image, block, run, (row, channels), (_, first, inner) = at
    z = buffers["room" if made.alone else "z"]
    cells = [(r, j) for r in range(made.height) for j in range(len(places))]
    for r, j in cells:
        T.buffer_store(sums, spread(tirx.const(0.0, "float32"), lanes), [r * made.wide + j])
    with T.serial(i64(0), i64(g.depth)) as c:
        for tap, offset in enumerate(to.offsets):
            start = run * i64(to.step) + i64(offset)
            inputs = [T.Bind(z[row, channels + c, span(start + place, lanes)]) for place in places]
            for r in range(made.height):
                factor = spread(buffers["w"][block, c * i64(g.taps) + i64(tap), r], lanes)
                for j, values in enumerate(inputs):
                    cell = r * made.wide + j
                    T.buffer_store(sums, sums[cell] + factor * values, [cell])

    def store(r: int) -> None:
        for j, place in enumerate(places):
            where = [image, first + i64(r), span(run * i64(to.length) + place, lanes)]
            _store(buffers, sums[r * made.wide + j], where, lanes, limits)

    _each_channel(made, inner, store)


def _corner(made: Plan, buffers: dict[str, Any], at: _Place, limits: tuple[Any, Any]) -> None:
    """The last outputs of a run: a vector of channels for each, in several sums that take turns."""
    g, to = made.geometry, made.arranged
    image, block, run, (row, channels), (_, first, inner) = at
    z = buffers["room" if made.alone else "z"]
    turns = -(-IN_FLIGHT // made.corner)
    together = next(
        d
        for d in range(1, g.depth + 1)
        if not g.depth % d and (d * g.taps >= turns or d == g.depth)
    )
    turns = min(turns, together * g.taps)
    kind = vector("float32", made.height)
    sums = T.alloc_buffer((made.corner * turns,), kind, scope="local")
    for cell in range(made.corner * turns):
        T.buffer_store(sums, spread(tirx.const(0.0, "float32"), made.height), [cell])
    with T.serial(i64(0), i64(g.depth // together)) as part:
        for term in range(together * g.taps):
            channel, tap = part * i64(together) + i64(term // g.taps), term % g.taps
            place = channel * i64(g.taps) + i64(tap)
            weights = T.Bind(buffers["w"][block, place, span(i64(0), made.height)])
            start = run * i64(to.step) + i64(to.offsets[tap] + to.length - made.corner)
            for j in range(made.corner):
                cell = j * turns + term % turns
                factor = spread(z[row, channels + channel, start + i64(j)], made.height)
                T.buffer_store(sums, sums[cell] + factor * weights, [cell])
    totals = []
    for j in range(made.corner):
        total = sums[j * turns]
        for turn in range(1, turns):
            total = total + sums[j * turns + turn]
        totals.append(T.Bind(total))

    def store(r: int) -> None:
        for j, total in enumerate(totals):
            place = run * i64(to.length) + i64(to.length - made.corner + j)
            where = [image, first + i64(r), place]
            _store(buffers, tirx.Shuffle([total], [r]), where, 1, limits)

    _each_channel(made, inner, store)


def _channels(made: Plan, block: Any) -> tuple[Any, Any, Any]:
    """Of a block: its group's first input channel, its first output channel, overall and there."""
    g = made.geometry
    group = T.Bind(tirx.floordiv(block, i64(made.blocks_per_group)))
    inner = T.Bind(tirx.floormod(block, i64(made.blocks_per_group)) * i64(made.height))
    return T.Bind(group * i64(g.depth)), group * i64(g.outputs // g.groups) + inner, inner


def _each_channel(made: Plan, inner: Any, emit: Callable[[int], None]) -> None:
    """Code for each channel of a block that is there."""
    outputs = made.geometry.outputs // made.geometry.groups
    for r in range(made.height):
        if outputs % made.height:
            with T.If(inner + i64(r) < i64(outputs)), T.Then():
                emit(r)
        else:
            emit(r)


def _store(
    buffers: dict[str, Any], total: Any, where: list[Any], lanes: int, limits: tuple[Any, Any]
) -> None:
    T.buffer_store(buffers["out"], limited(buffers, total, where, lanes, limits), where)


def limited(
    buffers: dict[str, Any],
    total: Any,
    where: list[Any],
    lanes: int,
    limits: tuple[float | None, float | None],
) -> Any:
    """Sums with what follows them: bias and residual where there are any, lower and upper limit."""
    value = total
    if "bias" in buffers:
        value = value + spread(buffers["bias"][where[1]], lanes)
    if "residual" in buffers:
        value = value + buffers["residual"][tuple(where)]
    for limit, choose in zip(limits, (tirx.max, tirx.min), strict=True):
        if limit is not None:
            value = choose(value, spread(tirx.const(limit, "float32"), lanes))
    return value
