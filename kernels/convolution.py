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

import abc
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T  # noqa: N812

from hal.kernels.arrange import arrange_channel
from hal.kernels.convolution_plan import IN_FLIGHT, Plan
from hal.kernels.emitting import ATTRIBUTES, i64, vector
from hal.kernels.vectors import span, spread

_NEAR_BYTES = 1 << 18
"""What a task reads of the input for one block of channels, so that the next finds it near."""

_FAR_BYTES = 1 << 19
"""Weights that come from far: a core's own memory does not hold them beside the input."""

_ASKED, _LINE, _WORD = 2048, 64, 4
"""Bytes of such weights that are asked for at once, so much ahead; of a cache line, of a weight.

Where pages are small, machines do not find the next one by themselves.
"""

_TASKS_PER_CORE = 4


_Place = tuple[Any, Any, Any, list[Any], tuple[Any, Any, Any]]
"""Image, block, run, where the input is (row and first channel), and :func:`_channels`."""


class Terms(abc.ABC):
    """What a kernel sums over the window, and what it makes of it. Equal ones make equal code."""

    dtype: ClassVar[str] = "float32"
    """Of a sum, of a weight, and of the input as it is arranged."""

    given: ClassVar[str] = "float32"
    """Of the input as it is given."""

    planes: ClassVar[int] = 1
    """As many as a block has channels, where each of them has an input of its own."""

    weighted: ClassVar[bool] = True
    """Whether there are weights; a maximum has none."""

    @property
    def border(self) -> int:
        """What the input has around it."""
        return 0

    def read(self, values: Any, lanes: int, plane: int) -> Any:
        """The input as it is arranged for a channel of a block, of what is given."""
        return values

    def packed_shape(self, made: Plan) -> tuple[int, int, int]:
        """Of the weights."""
        return made.packed_shape

    def corner_lanes(self, made: Plan) -> int:
        """Lanes of a vector of a block's channels; those beyond the last do not count."""
        return made.height

    @abc.abstractmethod
    def parameters(self, made: Plan, batch: Any) -> dict[str, tuple[tuple[Any, ...], str]]:
        """Shapes and dtypes of what comes after input and weights; ``out`` is the last."""

    @abc.abstractmethod
    def first(self, buffers: dict[str, Any], channel: Any, lanes: int) -> Any:
        """What a sum of the output ``channel`` starts from; None: of any, or of several."""

    @abc.abstractmethod
    def add(self, total: Any, values: Any, factor: Any, lanes: int) -> Any:
        """The sum with one more term; either operand may be the one that is broadcast."""

    @abc.abstractmethod
    def store(
        self, made: Plan, buffers: dict[str, Any], at: Any, sums: list[list[Any]], places: list[Any]
    ) -> None:
        """Code that stores the sums of a block: ``sums[channel][place]``, ``places`` are indices.

        ``at`` is the image, the block's first output channel, overall and in its group.
        """

    @abc.abstractmethod
    def store_corner(
        self, made: Plan, buffers: dict[str, Any], at: Any, totals: list[Any], places: list[Any]
    ) -> None:
        """The same of vectors of the block's channels, one for each place."""


@dataclasses.dataclass(frozen=True)
class Floats(Terms):
    """``out = min(max(conv(z, w) + bias + residual, low), high)``; float32.

    ``bias[outputs]``; residual and out are ``[B, outputs, height * width]``. Parameters that are
    switched off are left out.
    """

    bias: bool = True
    residual: bool = False
    low: float | None = None
    high: float | None = None

    def parameters(self, made: Plan, batch: Any) -> dict[str, tuple[tuple[Any, ...], str]]:
        """As :class:`Terms` says."""
        g = made.geometry
        maps = (batch, g.outputs, g.out[0] * g.out[1])
        shapes: dict[str, tuple[Any, ...]] = {
            **({"bias": (g.outputs,)} if self.bias else {}),
            **({"residual": maps} if self.residual else {}),
            "out": maps,
        }
        return {name: (shape, "float32") for name, shape in shapes.items()}

    def first(self, buffers: dict[str, Any], channel: Any, lanes: int) -> Any:
        """Zero."""
        return spread(tirx.const(0.0, "float32"), lanes)

    def add(self, total: Any, values: Any, factor: Any, lanes: int) -> Any:
        """A multiplication and an addition."""
        return total + factor * values

    def store(
        self, made: Plan, buffers: dict[str, Any], at: Any, sums: list[list[Any]], places: list[Any]
    ) -> None:
        """Vectors of outputs."""
        image, first, inner = at

        def one(r: int) -> None:
            for total, place in zip(sums[r], places, strict=True):
                where = [image, first + i64(r), span(place, made.lanes)]
                self._store(buffers, total, where, made.lanes)

        _each_channel(made, inner, one)

    def store_corner(
        self, made: Plan, buffers: dict[str, Any], at: Any, totals: list[Any], places: list[Any]
    ) -> None:
        """Element by element."""
        image, first, inner = at

        def one(r: int) -> None:
            for total, place in zip(totals, places, strict=True):
                where = [image, first + i64(r), place]
                self._store(buffers, tirx.Shuffle([total], [r]), where, 1)

        _each_channel(made, inner, one)

    def _store(self, buffers: dict[str, Any], total: Any, where: list[Any], lanes: int) -> None:
        value = limited(buffers, total, where, lanes, (self.low, self.high))
        T.buffer_store(buffers["out"], value, where)


@functools.lru_cache(maxsize=256)
def convolution(made: Plan, cores: int, terms: Terms = Floats()) -> Any:
    """The convolution of ``z`` with ``w``: what ``terms`` makes of it.

    ``z[B, channels, extent]`` is arranged, ``w`` is packed. Where the plan says :attr:`Plan.alone`,
    ``z`` is the input ``[B, channels, height, width]`` itself, and a last result is room for
    :func:`tasks` channels of each image, ``[B * tasks, planes, extent]``.
    """
    g = made.geometry
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("convolution")
        batch = tirx.Var("batch", "int64")
        kinds: dict[str, tuple[tuple[Any, ...], str]] = {}
        maps = (batch, g.channels, *(g.size if made.alone else [made.arranged.extent]))
        kinds["z"] = maps, terms.given
        if terms.weighted:
            kinds["w"] = terms.packed_shape(made), terms.dtype
        kinds |= terms.parameters(made, batch)
        results = ["out"]
        if made.alone:
            room = (batch * i64(tasks(made, cores)), terms.planes, made.arranged.extent)
            kinds["room"] = room, terms.dtype
            results.append("room")
        handles = {name: T.arg(name, T.handle()) for name in kinds}
        T.func_attr(ATTRIBUTES)
        buffers = {n: T.match_buffer(handles[n], *kind) for n, kind in kinds.items()}
        with T.sblock("root"):
            whole = {n: buffers[n][tuple(slice(0, d) for d in kinds[n][0])] for n in kinds}
            T.reads([whole[n] for n in kinds if n not in results])
            T.writes([whole[n] for n in results])
            _tasks(made, cores, buffers, batch, terms)
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
    terms: Terms,
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
        sums = T.alloc_buffer(size, vector(terms.dtype, made.lanes), scope="local")
        with T.serial(first, tirx.min(first + i64(share), i64(blocks))) as block:
            at = _channels(made, block)
            source = [image, at[0]]
            if made.alone:
                source = [task, i64(0)]
                for plane in range(terms.planes):
                    arrange_channel(
                        made, buffers["z"], buffers["room"], [image, at[0]],
                        [task, i64(plane)], terms.border,
                        functools.partial(terms.read, plane=plane),
                    )  # fmt: skip
            with T.serial(first_run, tirx.min(first_run + i64(runs), i64(to.runs))) as run:
                here = (image, block, run, source, at)
                if full:
                    with T.serial(i64(0), i64(full)) as t:
                        before = T.Bind(t * i64(made.wide * made.lanes))
                        places = [before + i64(j * made.lanes) for j in range(made.wide)]
                        _tile(made, buffers, sums, here, places, terms)
                if starts:
                    _tile(made, buffers, sums, here, [i64(s) for s in starts], terms)
                if made.corner:
                    _corner(made, buffers, here, terms)


def _tiles(made: Plan) -> tuple[int, list[int]]:
    """How many tiles of a run are whole, and where the vectors of what is left start."""
    length, lanes = made.arranged.length - made.corner, made.lanes
    vectors = -(-length // lanes)
    whole = length // lanes // made.wide
    return whole, [min(v * lanes, length - lanes) for v in range(whole * made.wide, vectors)]


def _tile(
    made: Plan, buffers: dict[str, Any], sums: Any, at: _Place, places: list[Any], terms: Terms
) -> None:
    """``height`` channels times the vectors that start at ``places`` in a run."""
    g, to, lanes = made.geometry, made.arranged, made.lanes
    image, block, run, (row, channels), (_, first, inner) = at
    z = buffers["room" if made.alone else "z"]
    for r in range(made.height):
        start = terms.first(buffers, first + i64(r), lanes)
        for j in range(len(places)):
            T.buffer_store(sums, start, [r * made.wide + j])

    def products(c: Any) -> None:
        for tap, offset in enumerate(to.offsets):
            start = run * i64(to.step) + i64(offset)
            inputs = [
                [T.Bind(z[row, channels + c + i64(p), span(start + x, lanes)]) for x in places]
                for p in range(terms.planes)
            ]
            for r in range(made.height):
                factor = None
                if terms.weighted:
                    factor = spread(buffers["w"][block, c * i64(g.taps) + i64(tap), r], lanes)
                for j, values in enumerate(inputs[r if terms.planes > 1 else 0]):
                    cell = r * made.wide + j
                    T.buffer_store(sums, terms.add(sums[cell], values, factor, lanes), [cell])

    shape = terms.packed_shape(made) if terms.weighted else (0, 0, 0)
    if math.prod(shape) * _WORD < _FAR_BYTES:
        with T.serial(i64(0), i64(g.depth)) as c:
            products(c)
    else:
        # In a loop of its own: LLVM spills sums in a loop that asks for memory.
        each = g.taps * made.height * _WORD
        divisors = [d for d in range(1, g.depth + 1) if not g.depth % d]
        part = next((d for d in divisors if d * each >= _ASKED), g.depth)
        with T.serial(i64(0), i64(g.depth // part)) as p:
            _ask(buffers["w"], shape, block, p * i64(part * g.taps), part * g.taps)
            with T.serial(i64(0), i64(part)) as c:
                products(p * i64(part) + c)
    found = [[sums[r * made.wide + j] for j in range(len(places))] for r in range(made.height)]
    indices = [run * i64(to.length) + place for place in places]
    terms.store(made, buffers, (image, first, inner), found, indices)


def _ask(w: Any, shape: tuple[int, int, int], block: Any, term: Any, count: int) -> None:
    """Ask for the weights that come a while after ``count`` terms; behind the last is no harm."""
    _, terms, height = shape
    later = -(-_ASKED // (_WORD * height * count)) * count
    start = block * i64(terms) + term + i64(later)
    for word in range(0, count * height, _LINE // _WORD):
        place = tirx.address_of(w[i64(0), start, i64(word)])
        how = [tirx.const(number, "int32") for number in (0, 3, 1)]  # to read, keep, data
        T.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", place, *how))


def _corner(made: Plan, buffers: dict[str, Any], at: _Place, terms: Terms) -> None:
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
    lanes = terms.corner_lanes(made)
    size = (made.corner * turns,)
    sums = T.alloc_buffer(size, vector(terms.dtype, lanes), scope="local")
    for cell in range(made.corner * turns):
        T.buffer_store(sums, spread(tirx.const(0, terms.dtype), lanes), [cell])
    with T.serial(i64(0), i64(g.depth // together)) as part:
        for term in range(together * g.taps):
            channel, tap = part * i64(together) + i64(term // g.taps), term % g.taps
            place = channel * i64(g.taps) + i64(tap)
            weights = T.Bind(buffers["w"][block, place, span(i64(0), lanes)])
            start = run * i64(to.step) + i64(to.offsets[tap] + to.length - made.corner)
            for j in range(made.corner):
                cell = j * turns + term % turns
                values = spread(z[row, channels + channel, start + i64(j)], lanes)
                T.buffer_store(sums, terms.add(sums[cell], values, weights, lanes), [cell])
    totals = []
    for j in range(made.corner):
        total = sums[j * turns]
        for turn in range(1, turns):
            total = total + sums[j * turns + turn]
        totals.append(T.Bind(total))
    end = run * i64(to.length) + i64(to.length - made.corner)
    indices = [end + i64(j) for j in range(made.corner)]
    terms.store_corner(made, buffers, (image, first, inner), totals, indices)


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
