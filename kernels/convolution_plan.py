"""How a convolution is computed: its sizes, how the input lies, which block fits the registers."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

MOST_TAPS = 121
"""Elements of the largest window: its taps are written out."""

FEWEST_LANES = 4
"""Maps that do not fill such a vector have no kernel."""

_RUN_VECTORS = 8
"""Vectors that rows are joined to, where they can be."""

_LOAD = 0.25
"""Cost of a load beside that of a multiplication: most of it is hidden."""

IN_FLIGHT = 8
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
    def alone(self) -> bool:
        """Whether a task arranges each channel itself: nobody else reads it, so it stays near."""
        g = self.geometry
        return g.depth == 1 < g.groups and not self.arranged.as_given

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
def plan(geometry: Geometry, lanes: int, registers: int, together: int = 1) -> Plan | None:
    """How to compute it with vectors of at most ``lanes``, or None: there is no kernel.

    A block has a multiple of ``together`` channels; more than one ask for exactly ``lanes``.
    """
    if geometry.taps > MOST_TAPS or min(geometry.out) < 1:
        return None
    fewest = lanes if together > 1 else FEWEST_LANES
    while lanes >= fewest:
        arranged = _arranged(geometry, lanes)
        if arranged.length >= lanes:
            outputs = geometry.outputs // geometry.groups
            block = _block(outputs, arranged.length, lanes, registers, together)
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


def _block(
    outputs: int, length: int, lanes: int, registers: int, together: int
) -> tuple[int, int, int]:
    """Channels, vectors and corner of the block with the fewest multiplications and loads."""
    vectors, left = divmod(length, lanes)

    def tap(height: int, wide: int) -> float:
        return max(height * wide, IN_FLIGHT) + _LOAD * (height + wide) if wide else 0

    def cost(block: tuple[int, int, int]) -> float:
        height, wide, corner = block
        whole = vectors + (left > corner)
        tiles = whole // wide * tap(height, wide) + tap(height, whole % wide)
        return -(-outputs // height) * (tiles + corner + _LOAD * (corner + 1) * (corner > 0))

    sizes = range(1, registers)
    heights = sizes[together - 1 :: together]
    fit = [(h, w) for h in heights for w in sizes if h * w + w < registers]
    fit = [(h, w) for h, w in fit if h <= outputs and w <= vectors + (left > 0)]
    full = [(h, w, 0) for h, w in fit]
    if left:
        full += [(h, w, left) for h, w in fit if left < h <= lanes and w <= vectors]
    return min(full, key=cost, default=(together, 1, 0))


def pack(weights: np.ndarray, made: Plan) -> np.ndarray:
    """``[outputs, channels / groups, *window]`` as :attr:`Plan.packed_shape`."""
    g, (blocks, terms, height) = made.geometry, made.packed_shape
    rows = weights.reshape(g.groups, g.outputs // g.groups, terms)
    missing = made.blocks_per_group * height - rows.shape[1]
    rows = np.pad(rows, ((0, 0), (0, missing), (0, 0)))
    return np.ascontiguousarray(rows.reshape(blocks, height, terms).transpose(0, 2, 1))
