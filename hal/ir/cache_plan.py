"""How a build carries its growing state: which pools there are, and the inputs that describe them.

The plan is written by the lowering (:mod:`hal.passes.cache_layout`), kept in the build's record,
and read by the session's store. Extents: ``pages`` and ``page`` of a group are chosen at run time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hal.ir.graph import Graph

PLAN_KEY = "cache_plan"
"""Where the lowering leaves its plan in the graph's metadata."""

ALIAS_KEY = "cache_alias"
"""Where a backend leaves further outputs that share an input's memory."""

FIXED_KEY = "cache_fixed"
"""Set in the metadata by a backend whose build relies on the plan's layout."""

PAST = "hal.past"
"""Input int64 [batch]: tokens that each row has seen."""

TOP = {8: 127.0, 4: 7.0}
"""The largest code of each width."""

SMALLEST_SCALE = 6e-8
"""The smallest number above zero that float16 has."""

RECENT = 64
"""Newest positions that a 4-bit cache also keeps in float32.

Measured on the demo model, 511 tokens, share of unchanged best tokens: 0.88 without, 0.978 with 32,
0.986 with 64 (KIVI, arXiv:2402.02750, keeps a residual for the same reason)."""

BLOCK = 16
"""Most channels that share a scale.

Measured as above with 8 bits: one scale for a head of 64 channels 0.980, for 16 channels 0.996."""

LAYOUTS = ("contiguous", "paged")
"""One page per row that grows with it, or pages of fixed size from a common pool."""


@dataclasses.dataclass(frozen=True)
class CacheGroup:
    """Pools whose rows hold the same positions.

    ``window`` is how far back any query of the group looks, 0 for all of the past. ``lengths`` and
    ``table`` are input names: int64 [batch] positions held, int32 [batch, blocks] block table.
    """

    name: str
    window: int
    lengths: str
    table: str


@dataclasses.dataclass(frozen=True)
class CachePool:
    """The pool ``[pages, heads, page, channels]`` of one state.

    ``bits`` is 0 for the state's own float32, else 8 or 4: codes of that width, with float16
    scales ``[pages, heads, page, channels / block]`` in a second pool. ``channels`` counts
    numbers, not stored bytes. ``copy``: it holds the newest positions of a state that another pool
    holds whole, before they were rounded.
    """

    state: str
    group: str
    heads: int
    channels: int
    bits: int
    input: str
    output: str
    block: int = 1
    copy: bool = False

    @property
    def dtype(self) -> str:
        """NumPy name of what is stored."""
        return {0: "float32", 8: "int8", 4: "uint8"}[self.bits]

    @property
    def stored_channels(self) -> int:
        """Last extent of the pool."""
        return self.channels // 2 if self.bits == 4 else self.channels

    @property
    def scales(self) -> int:
        """Scales of a head at a position."""
        return self.channels // self.block

    @property
    def scale_input(self) -> str:
        """Input that holds the scales (only if ``bits``)."""
        return f"{self.input}.scale"

    @property
    def scale_output(self) -> str:
        """Output that holds the scales (only if ``bits``)."""
        return f"{self.output}.scale"

    @property
    def token_bytes(self) -> int:
        """Bytes that one position takes."""
        item = {0: 4.0, 8: 1.0, 4: 0.5}[self.bits]
        return int(self.heads * (self.channels * item + (2 * self.scales if self.bits else 0)))


@dataclasses.dataclass(frozen=True)
class CachePlan:
    """All pools of a build.

    ``ragged``: rows of a batch may differ in length. ``fixed``: the build relies on ``layout``, so
    a session may not choose the other one.
    """

    layout: str
    bits: int
    ragged: bool
    groups: tuple[CacheGroup, ...]
    pools: tuple[CachePool, ...]
    fixed: bool = False

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; inverse of :meth:`from_json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CachePlan:
        """From :meth:`to_json`'s dictionary."""
        return cls(
            data["layout"],
            data["bits"],
            data["ragged"],
            tuple(CacheGroup(**g) for g in data["groups"]),
            tuple(CachePool(**p) for p in data["pools"]),
            data.get("fixed", False),
        )

    def token_bytes(self) -> int:
        """Bytes of cache that one more token takes in layers that keep everything."""
        full = {g.name for g in self.groups if not g.window}
        return sum(p.token_bytes for p in self.pools if p.group in full)

    def in_place(self) -> dict[str, str]:
        """Output by output: the input whose memory it shares."""
        pairs = {p.output: p.input for p in self.pools}
        pairs.update({p.scale_output: p.scale_input for p in self.pools if p.bits})
        return pairs


def plan_of(graph: Graph) -> CachePlan | None:
    """The plan that the lowering left in a graph, if it was lowered."""
    data = graph.metadata.get(PLAN_KEY)
    return None if data is None else CachePlan.from_json(data)


def in_place(graph: Graph) -> dict[str, str]:
    """Outputs of a lowered graph, or a part of one, that are its inputs, written in place."""
    plan = plan_of(graph)
    if plan is None:
        return {}
    names_in = {v.name for v in graph.graph.inputs}
    names_out = {v.name for v in graph.graph.outputs}
    pairs = {**plan.in_place(), **graph.metadata.get(ALIAS_KEY, {})}
    return {o: i for o, i in pairs.items() if o in names_out and i in names_in}
