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

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T  # noqa: N812

from hal.kernels.emitting import ATTRIBUTES, i64, vector
from hal.kernels.vectors import span, spread

MOST_TAPS = 121
"""Elements of the largest window: its taps are written out."""

FEWEST_LANES = 4
"""Maps that do not fill such a vector have no kernel."""

_NEAR_BYTES = 1 << 18
"""What a task reads of the input for one block of channels, so that the next finds it near."""

_RUN_VECTORS = 8
"""Vectors that rows are joined to, where they can be."""

_WRITTEN_OUT = 16
"""Most vectors of a row whose places are written out."""

_TASKS_PER_CORE = 4

_LOAD = 0.25
"""Cost of a load beside that of a multiplication: most of it is hidden."""

_IN_FLIGHT = 8
"""Sums that keep the multipliers busy while others wait for their last addition."""


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Sizes of a convolution; all but the batch.

    ``pads`` are top, left, bottom, right. Weights are ``[outputs, channels / groups, *window]``.
    """

    channels: int
    outputs: int
    groups: int
    size: tuple[int, int]
    window: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of the result."""
        return self._extent(0), self._extent(1)

    def _extent(self, axis: int) -> int:
        room = self.size[axis] + self.pads[axis] + self.pads[axis + 2] - 1
        return (room - self.dilations[axis] * (self.window[axis] - 1)) // self.strides[axis] + 1

    @property
    def depth(self) -> int:
        """Input channels of a group."""
        return self.channels // self.groups

    @property
    def taps(self) -> int:
        """Elements of the window."""
        return self.window[0] * self.window[1]


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """How a channel of the input lies, and what each tap reads of it.

    ``planes`` are (first row, first column) in the input with its borders; each has ``rows`` rows
    of ``pitch`` columns, a stride apart there. The result is ``runs`` runs of ``length``; a tap
    reads run ``i`` from ``offsets[tap] + i * step`` on.
    """

    planes: tuple[tuple[int, int], ...]
    rows: int
    pitch: int
    offsets: tuple[int, ...]
    runs: int
    length: int
    step: int
    as_given: bool

    @property
    def extent(self) -> int:
        """Elements of a channel."""
        return len(self.planes) * self.rows * self.pitch


@dataclasses.dataclass(frozen=True)
class Plan:
    """A convolution as a kernel computes it."""

    geometry: Geometry
    arranged: Arrangement
    lanes: int
    height: int
    wide: int
    corner: int = 0
    """Outputs at the end of a run that are computed one by one, the block's channels together."""

    @property
    def blocks_per_group(self) -> int:
        """Blocks of output channels of a group; the last may be partly empty."""
        return -(-self.geometry.outputs // self.geometry.groups // self.height)

    @property
    def packed_shape(self) -> tuple[int, int, int]:
        """Of the weights: blocks, input channels and taps, channels of a block."""
        g = self.geometry
        return g.groups * self.blocks_per_group, g.depth * g.taps, self.height


@functools.lru_cache(maxsize=1024)
def plan(geometry: Geometry, lanes: int, registers: int) -> Plan | None:
    """How to compute it with vectors of at most ``lanes``, or None: there is no kernel."""
    if geometry.taps > MOST_TAPS or min(geometry.out) < 1:
        return None
    while lanes >= FEWEST_LANES:
        arranged = _arranged(geometry, lanes)
        if arranged.length >= lanes:
            outputs = geometry.outputs // geometry.groups
            block = _block(outputs, arranged.length, lanes, registers)
            return Plan(geometry, arranged, lanes, *block)
        lanes //= 2
    return None


def _arranged(geometry: Geometry, lanes: int) -> Arrangement:
    (height, width), (kh, kw) = geometry.out, geometry.window
    (sh, sw), (dh, dw) = geometry.strides, geometry.dilations
    short = kw > 1 and width < 2 * lanes
    reach = 0 if short else (kw - 1) * dw // sw
    rows, pitch = height + (kh - 1) * dh // sh, width + reach
    places = [
        (
            (i * dh % sh, j * dw if short else j * dw % sw),
            (i * dh // sh, 0 if short else j * dw // sw),
        )
        for i in range(kh)
        for j in range(kw)
    ]
    planes = tuple(dict.fromkeys(plane for plane, _ in places))
    offsets = tuple(
        (planes.index(plane) * rows + row) * pitch + column for plane, (row, column) in places
    )
    joined = 1
    if pitch == width:
        divisors = [d for d in range(1, height + 1) if height % d == 0]
        joined = next((d for d in divisors if d * width >= _RUN_VECTORS * lanes), height)
    return Arrangement(
        planes, rows, pitch, offsets, height // joined, joined * width, joined * pitch,
        as_given=planes == ((0, 0),) and (rows, pitch) == geometry.size and not any(geometry.pads),
    )  # fmt: skip


def _block(outputs: int, length: int, lanes: int, registers: int) -> tuple[int, int, int]:
    """Channels, vectors and corner of the block with the fewest multiplications and loads."""
    vectors, left = divmod(length, lanes)

    def tap(height: int, wide: int) -> float:
        return max(height * wide, _IN_FLIGHT) + _LOAD * (height + wide) if wide else 0

    def cost(block: tuple[int, int, int]) -> float:
        height, wide, corner = block
        whole = vectors + (left > corner)
        tiles = whole // wide * tap(height, wide) + tap(height, whole % wide)
        return -(-outputs // height) * (tiles + corner + _LOAD * (corner + 1) * (corner > 0))

    sizes = range(1, registers)
    fit = [(h, w) for h in sizes for w in sizes if h * w + w < registers]
    fit = [(h, w) for h, w in fit if h <= outputs and w <= vectors + (left > 0)]
    full = [(h, w, 0) for h, w in fit]
    if left:
        full += [(h, w, left) for h, w in fit if left < h <= lanes and w <= vectors]
    return min(full, key=cost, default=(1, 1, 0))


def pack(weights: np.ndarray, made: Plan) -> np.ndarray:
    """``[outputs, channels / groups, *window]`` as :attr:`Plan.packed_shape`; float32."""
    g, (blocks, terms, height) = made.geometry, made.packed_shape
    rows = weights.reshape(g.groups, g.outputs // g.groups, terms)
    missing = made.blocks_per_group * height - rows.shape[1]
    rows = np.pad(rows, ((0, 0), (0, missing), (0, 0)))
    return np.ascontiguousarray(rows.reshape(blocks, height, terms).transpose(0, 2, 1))


@functools.lru_cache(maxsize=256)
def arrange(made: Plan) -> Any:
    """``z[B, channels, extent]`` of ``x[B, channels, height, width]``; float32."""
    g, to = made.geometry, made.arranged
    (high, across), (top, left) = g.size, g.pads[:2]
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("arrange")
        handles = [T.arg(name, T.handle()) for name in ("x", "z")]
        T.func_attr(ATTRIBUTES)
        batch = tirx.Var("batch", "int64")
        x = T.match_buffer(handles[0], (batch, g.channels, high, across), "float32")
        z = T.match_buffer(handles[1], (batch, g.channels, to.extent), "float32")
        with T.sblock("root"):
            T.reads([x[0:batch, 0 : g.channels, 0:high, 0:across]])
            T.writes([z[0:batch, 0 : g.channels, 0 : to.extent]])
            with T.parallel(batch * i64(g.channels)) as task:
                b = T.Bind(tirx.floordiv(task, i64(g.channels)))
                c = T.Bind(tirx.floormod(task, i64(g.channels)))

                def clear(start: Any, count: int) -> None:
                    with T.serial(i64(0), i64(count)) as i:
                        T.buffer_store(z, tirx.const(0.0, "float32"), [b, c, start + i])

                for number, (row, column) in enumerate(to.planes):
                    # Columns whose source is inside, a stride apart.
                    first = min(max(-(-(left - column) // g.strides[1]), 0), to.pitch)
                    end = min(max(-(-(across + left - column) // g.strides[1]), first), to.pitch)
                    with T.serial(i64(0), i64(to.rows)) as r:
                        start = T.Bind((i64(number * to.rows) + r) * i64(to.pitch))
                        source = T.Bind(r * i64(g.strides[0]) + i64(row - top))
                        inside = tirx.all(source >= i64(0), source < i64(high))
                        with T.If(inside):
                            with T.Then():
                                if first:
                                    clear(start, first)
                                _take(
                                    x,
                                    z,
                                    [b, c, source],
                                    [b, c, start + i64(first)],
                                    first * g.strides[1] + column - left,
                                    end - first,
                                    g.strides[1],
                                    across,
                                    made.lanes,
                                )
                                if end < to.pitch:
                                    clear(start + i64(end), to.pitch - end)
                            with T.Else():
                                clear(start, to.pitch)
    return builder.get()


def _take(
    x: Any,
    z: Any,
    row: list[Any],
    to: list[Any],
    first: int,
    count: int,
    stride: int,
    across: int,
    lanes: int,
) -> None:
    """Copy ``count`` elements of a row from ``first`` on, ``stride`` apart, to neighbours."""
    starts = [min(v, count - lanes) for v in range(0, count, lanes)]
    if stride != 2 or count < lanes or len(starts) > _WRITTEN_OUT:
        with T.serial(i64(0), i64(count)) as i:
            T.buffer_store(z, x[(*row, i * i64(stride) + i64(first))], [*to[:2], to[2] + i])
        return
    for start in starts:
        # Two vectors of which every second element counts, from an even place or an odd one:
        # whichever stays in the row.
        place, odd = 2 * start + first, 0
        if place + 2 * lanes > across:
            place, odd = place - 1, 1
        if place < 0:
            pieces = [x[(*row, i64(place + odd + 2 * i))] for i in range(lanes)]
            value = tirx.Shuffle(pieces, [tirx.const(i, "int32") for i in range(lanes)])
        else:
            both = x[(*row, span(i64(place), 2 * lanes))]
            order = [tirx.const(2 * i + odd, "int32") for i in range(lanes)]
            value = tirx.Shuffle([both], order)
        T.buffer_store(z, value, [*to[:2], span(to[2] + i64(start), lanes)])


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
    ``[B, outputs, height * width]``. Parameters that are switched off are left out.
    """
    g = made.geometry
    blocks, terms, height = made.packed_shape
    pixels = g.out[0] * g.out[1]
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("convolution")
        given = {"bias": bias, "residual": residual}
        names = ["z", "w", *(name for name, there in given.items() if there), "out"]
        handles = {name: T.arg(name, T.handle()) for name in names}
        T.func_attr(ATTRIBUTES)
        batch = tirx.Var("batch", "int64")
        maps = (batch, g.outputs, pixels)
        shapes: dict[str, tuple[Any, ...]] = {
            "z": (batch, g.channels, made.arranged.extent),
            "w": (blocks, terms, height),
            "bias": (g.outputs,),
            "residual": maps,
            "out": maps,
        }
        buffers = {n: T.match_buffer(handles[n], shapes[n], "float32") for n in names}
        with T.sblock("root"):
            whole = {n: b[tuple(slice(0, d) for d in shapes[n])] for n, b in buffers.items()}
            T.reads([whole[n] for n in names[:-1]])
            T.writes([whole["out"]])
            _tasks(made, cores, buffers, batch, (low, high))
    return builder.get()


def _tasks(
    made: Plan,
    cores: int,
    buffers: dict[str, Any],
    batch: Any,
    limits: tuple[float | None, float | None],
) -> None:
    g, to = made.geometry, made.arranged
    blocks = made.packed_shape[0]
    runs = min(max(_NEAR_BYTES // (4 * g.depth * to.step), 1), to.runs)
    run_tasks = -(-to.runs // runs)
    share = -(-blocks // min(-(-_TASKS_PER_CORE * cores // run_tasks), blocks))
    block_tasks = -(-blocks // share)
    full, starts = _tiles(made)
    with T.parallel(batch * i64(run_tasks * block_tasks)) as task:
        image = T.Bind(tirx.floordiv(task, i64(run_tasks * block_tasks)))
        rest = T.Bind(tirx.floormod(task, i64(run_tasks * block_tasks)))
        first_run = T.Bind(tirx.floordiv(rest, i64(block_tasks)) * i64(runs))
        first = T.Bind(tirx.floormod(rest, i64(block_tasks)) * i64(share))
        size = (made.height * made.wide,)
        sums = T.alloc_buffer(size, vector("float32", made.lanes), scope="local")
        with (
            T.serial(first, tirx.min(first + i64(share), i64(blocks))) as block,
            T.serial(first_run, tirx.min(first_run + i64(runs), i64(to.runs))) as run,
        ):
            if full:
                with T.serial(i64(0), i64(full)) as t:
                    before = T.Bind(t * i64(made.wide * made.lanes))
                    places = [before + i64(j * made.lanes) for j in range(made.wide)]
                    _tile(made, buffers, sums, (image, block, run), places, limits)
            if starts:
                places = [i64(start) for start in starts]
                _tile(made, buffers, sums, (image, block, run), places, limits)
            if made.corner:
                _corner(made, buffers, (image, block, run), limits)


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
    at: tuple[Any, Any, Any],
    places: list[Any],
    limits: tuple[float | None, float | None],
) -> None:
    """``height`` channels times the vectors that start at ``places`` in a run."""
    g, to, lanes = made.geometry, made.arranged, made.lanes
    image, block, run = at
    sources, first, inner = _channels(made, block)
    cells = [(r, j) for r in range(made.height) for j in range(len(places))]
    for r, j in cells:
        T.buffer_store(sums, spread(tirx.const(0.0, "float32"), lanes), [r * made.wide + j])
    with T.serial(i64(0), i64(g.depth)) as c:
        for tap, offset in enumerate(to.offsets):
            start = run * i64(to.step) + i64(offset)
            inputs = [
                T.Bind(buffers["z"][image, sources + c, span(start + place, lanes)])
                for place in places
            ]
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


def _corner(
    made: Plan, buffers: dict[str, Any], at: tuple[Any, Any, Any], limits: tuple[Any, Any]
) -> None:
    """The last outputs of a run: a vector of channels for each, in several sums that take turns."""
    g, to = made.geometry, made.arranged
    image, block, run = at
    sources, first, inner = _channels(made, block)
    turns = -(-_IN_FLIGHT // made.corner)
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
            row = channel * i64(g.taps) + i64(tap)
            weights = T.Bind(buffers["w"][block, row, span(i64(0), made.height)])
            start = run * i64(to.step) + i64(to.offsets[tap] + to.length - made.corner)
            for j in range(made.corner):
                cell = j * turns + term % turns
                factor = spread(buffers["z"][image, sources + channel, start + i64(j)], made.height)
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
