"""Lower growing state to pools of pages: how a build carries what the model remembers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from hal.errors import InputError
from hal.ir import HAL_DOMAIN, Graph, State
from hal.ir.cache_ops import CACHE_WRITE, CACHED_ATTENTION
from hal.ir.cache_plan import (
    BLOCK,
    PAST,
    PLAN_KEY,
    RECENT,
    SMALLEST_SCALE,
    TOP,
    CacheGroup,
    CachePlan,
    CachePool,
)
from hal.ir.ops import ensure_functions
from hal.passes._edit import Editor, attribute, dim, ints, producer, remove_unused
from hal.passes._program import program_of
from hal.passes._symbolic import analyse
from hal.passes.base import Outcome, Pass
from hal.passes.causal_mask import CAUSAL_KEY, WINDOW_KEY

_AXIS = 2
_BATCHES = ((1, 1, 0), (2, 3, 4), (3, 1, 7), (2, 6, 33))
"""Batch, sequence and past at which a candidate for the positions is computed."""


@dataclasses.dataclass(frozen=True)
class CacheLayout(Pass):
    """Turn attention over carried keys and values into writes to, and reads from, pools of pages.

    Nothing that grows goes in and out by value any more: a step writes its new positions in place.
    Each row of a batch has a length of its own. Preserves results up to rounding (``bits`` 0), or
    up to the rounding of keys and values to 8 or 4 bits, with a scale for each few channels; with 4
    bits the newest positions are kept as they are as well. A graph whose attention cannot be
    lowered, or that carries nothing, is left alone.
    """

    layout: str = "contiguous"
    bits: int = 0
    name: ClassVar[str] = "cache_layout"

    def run(self, graph: Graph) -> Outcome:
        """Lower all growing states or none."""
        sites = find_sites(graph)
        if sites is None:
            return Outcome(0)
        plan = _Lowering(graph, sites, self.layout, self.bits).run()
        graph.metadata[PLAN_KEY] = plan.to_json()
        return Outcome(len(sites), {"layout": self.layout, "bits": self.bits})


@dataclasses.dataclass(frozen=True)
class Site:
    """An ``Attention`` over carried state.

    ``value`` is None when values are a prefix of the keys, ``value_size`` channels long.
    """

    node: ir.Node
    key: State
    value: State | None
    value_size: int
    window: int


def find_sites(graph: Graph) -> list[Site] | None:
    """Every attention over carried state, or None unless they cover all growing state."""
    by_input = {s.input: s for s in graph.state if s.growth_axis is not None}
    found = [_site(node, by_input) for node in graph.graph if _attends(node, by_input)]
    sites = [s for s in found if s is not None]
    covered = {s.name for site in sites for s in (site.key, site.value) if s is not None}
    if not sites or len(sites) != len(found) or covered != {s.name for s in by_input.values()}:
        return None
    return sites


def _attends(node: ir.Node, by_input: dict[str, State]) -> bool:
    past = node.inputs[4] if len(node.inputs) > 4 else None
    return node.op_type == "Attention" and not node.domain and past is not None


def _site(node: ir.Node, by_input: dict[str, State]) -> Site | None:
    q, k, v, mask, past_key, past_value = node.inputs[:6]
    window = int(node.metadata_props.get(WINDOW_KEY, 0))
    causal = attribute(node, "is_causal", 0) == 1 and mask is None
    if not (causal or window or CAUSAL_KEY in node.metadata_props) or len(node.inputs) > 6:
        return None
    if past_key is None or past_value is None or len(node.outputs) < 2:
        return None
    key = by_input.get(past_key.name or "")
    if key is None or key.growth_axis != _AXIS or node.outputs[1].name != key.output:
        return None
    shapes = [x.shape if x is not None else None for x in (q, k, v)]
    if any(s is None or len(s) != 4 or not isinstance(s[3], int) for s in shapes):
        return None
    if not all(isinstance(s[1], int) for s in shapes if s is not None) or q is None:
        return None
    if q.dtype is not ir.DataType.FLOAT:
        return None
    prefix = _prefix_of(past_value, past_key)
    if prefix:
        return Site(node, key, None, prefix, window)
    value = by_input.get(past_value.name or "")
    if value is None or value.growth_axis != _AXIS or len(node.outputs) < 3:
        return None
    return Site(node, key, value, 0, window) if node.outputs[2].name == value.output else None


def _prefix_of(value: ir.Value, source: ir.Value) -> int:
    """How many first channels of ``source`` ``value`` is; 0 if it is something else."""
    if value is source:
        return dim(value, 3) or 0
    node = producer(value, "Slice")
    if node is None or node.inputs[0] is not source or len(node.inputs) < 4:
        return 0
    starts, axes = ints(node.inputs[1]), ints(node.inputs[3])
    steps = ints(node.inputs[4]) if len(node.inputs) > 4 else [1]
    plain = starts == [0] and axes in ([3], [-1]) and steps == [1]
    return (dim(value, 3) or 0) if plain else 0


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A pool, its value after the new positions were written, and that of its scales."""

    pool: CachePool
    written: ir.Value
    scales: ir.Value | None


class _Lowering:
    """One graph being lowered; the order of the steps is that of :meth:`run`."""

    def __init__(self, graph: Graph, sites: Sequence[Site], layout: str, bits: int) -> None:
        self.graph, self.sites, self.layout, self.bits = graph, sites, layout, bits
        self.edit = Editor(graph)
        first = next(iter(graph.graph), None)
        assert first is not None
        self.edit.at(first)
        carried = {s.input for s in graph.state}
        self.source = next(v for v in graph.graph.inputs if v.name not in carried)
        assert self.source.shape is not None
        self.batch, self.sequence = self.source.shape[0], self.source.shape[1]
        self.groups: dict[str, CacheGroup] = {}
        self.lengths: dict[str, ir.Value] = {}
        self.inputs = {v.name: v for v in graph.graph.inputs}

    def run(self) -> CachePlan:
        past = self._input(PAST, ir.DataType.INT64, [self.batch])
        positions = self._positions()
        self._replace_positions(positions, past)
        self._replace_shapes(past)
        pools = [pool for site in self.sites for pool in self._lower(site, past)]
        grown = {p.state for p in pools}
        self.graph.state = tuple(s for s in self.graph.state if s.name not in grown)
        remove_unused(self.graph)
        self._drop_inputs()
        ensure_functions(self.graph.model)
        return CachePlan(
            self.layout, self.bits, not self._longest.uses(), tuple(self.groups.values()),
            tuple(pools),
        )  # fmt: skip

    # -- positions and extents --------------------------------------------------------------------

    def _positions(self) -> list[ir.Value]:
        """Values ``[batch, sequence]`` that are ``past + 0, 1, …`` in every row."""
        shapes = analyse(self.graph)
        pasts = {
            symbol
            for site in self.sites
            for value in [site.node.inputs[4]]
            if value is not None and value in shapes.shape
            for symbol in shapes.shape[value][_AXIS].free_symbols
        }
        wanted = shapes.shape.get(self.source)
        if wanted is None:
            return []
        found = []
        for node in self.graph.graph:
            for value in node.outputs:
                if value.dtype is not ir.DataType.INT64 or shapes.shape.get(value) != wanted:
                    continue
                program = program_of(value, shapes)
                if program is not None and self._is_positions(program, wanted, pasts):
                    found.append(value)
        return found

    @staticmethod
    def _is_positions(program: Any, extents: Any, pasts: set[Any]) -> bool:
        for batch, sequence, past in _BATCHES:
            values = dict.fromkeys(program.symbols, batch)
            values.update(dict.fromkeys(pasts, past))
            values.update(dict.fromkeys(extents[0].free_symbols, batch))
            values.update(dict.fromkeys(extents[1].free_symbols, sequence))
            result = program.evaluate(values)
            expected = np.broadcast_to(past + np.arange(sequence), (batch, sequence))
            if result is None or not np.array_equal(result, expected):
                return False
        return True

    def _replace_positions(self, positions: list[ir.Value], past: ir.Value) -> None:
        if not positions:
            return
        scalars = [self.edit.constant(n, "number", np.int64) for n in (0, 1)]
        axes = [self.edit.constant([n], "axes", np.int64) for n in (0, 1)]
        length = self.edit.op("Shape", [self.source], {"start": 1, "end": 2})
        steps = self.edit.op("Squeeze", [length, axes[0]])
        steps = self.edit.op("Range", [scalars[0], steps, scalars[1]])
        start = self.edit.op("Unsqueeze", [past, axes[1]])
        made = self.edit.op("Add", [start, steps], like=positions[0])
        for value in positions:
            self.edit.replace(value, made)

    def _replace_shapes(self, past: ir.Value) -> None:
        """Who asks for the extents of a carried tensor gets them without the tensor."""
        axis = self.edit.constant([0], "axes", np.int64)
        self._longest = self.edit.op("ReduceMax", [past, axis], {"keepdims": 1})
        rows = self.edit.op("Shape", [self.source], {"start": 0, "end": 1})
        new = self.edit.op("Shape", [self.source], {"start": 1, "end": 2})
        after: ir.Value | None = None
        for state in [s for site in self.sites for s in (site.key, site.value) if s is not None]:
            outputs = [v for v in self.graph.graph.outputs if v.name == state.output]
            for value in [self.inputs[state.input], *outputs]:
                for node in [u.node for u in value.uses() if u.node.op_type == "Shape"]:
                    length = self._longest
                    if value in outputs:
                        after = after or self.edit.op("Add", [self._longest, new])
                        length = after
                    self._replace_shape(node, rows, length)

    def _replace_shape(self, node: ir.Node, rows: ir.Value, length: ir.Value) -> None:
        source = node.inputs[0]
        assert source is not None
        assert source.shape is not None
        axes = list(range(4))[attribute(node, "start", 0) : attribute(node, "end", 4)]
        parts = [
            rows if a == 0 else length if a == _AXIS
            else self.edit.constant([source.shape[a]], "extent", np.int64)
            for a in axes
        ]  # fmt: skip
        made = parts[0] if len(parts) == 1 else self.edit.op("Concat", parts, {"axis": 0})
        self.edit.replace(node.outputs[0], made)

    # -- attention --------------------------------------------------------------------------------

    def _lower(self, site: Site, past: ir.Value) -> list[CachePool]:
        node = site.node
        self.edit.at(node)
        # A window that the copy of the newest positions would hold whole is simply not rounded.
        bits = 0 if 0 < site.window <= RECENT else self.bits
        group = self._group(str(site.window) if site.window else "all", site.window, past)
        states = [(site.key, node.inputs[1])]
        if site.value is not None:
            states.append((site.value, node.inputs[2]))
        stored = [self._store(state, new, group, bits) for state, new in states]
        pools = [item.pool for item in stored]
        size = dim(node.inputs[0], 3)
        assert size is not None
        attributes = {
            "scale": attribute(node, "scale", size**-0.5),
            "softcap": attribute(node, "softcap", 0.0),
            "window": site.window,
            "value_size": site.value_size,
            "bits": bits,
            "recent": RECENT if bits == 4 else 0,
        }
        first, last = stored[0], stored[-1]
        inputs = [node.inputs[0], first.written, last.written, *self._described(group)]
        if bits:
            inputs += [first.scales, last.scales]
        if bits == 4:
            late = self._group("recent", RECENT, past)
            copies = [self._copy(state, new, late) for state, new in states]
            pools += [item.pool for item in copies]
            inputs += [copies[0].written, copies[-1].written, *self._described(late)]
        out = node.outputs[0]
        made = self.edit.op(CACHED_ATTENTION, inputs, attributes, like=out, domain=HAL_DOMAIN)
        self.edit.replace(out, made)
        return pools

    def _store(self, state: State, new: ir.Value | None, group: CacheGroup, bits: int) -> _Stored:
        """Write new positions to the state's pool, and their scales if they are rounded."""
        heads, channels = dim(new, 1), dim(new, 3)
        assert new is not None
        assert heads is not None
        assert channels is not None
        if bits == 4 and channels % 2:
            raise InputError(
                f"a 4-bit cache needs an even number of channels, {state.name!r} has {channels}",
                "use int8",
            )
        block = math.gcd(BLOCK, channels // 2 if bits == 4 else channels) if bits else 1
        pool = CachePool(
            state.name, group.name, heads, channels, bits, state.input, state.output, block
        )
        old = self.inputs[state.input]
        scales = None
        if bits:
            new, new_scales = self._quantized(new, bits, block)
            half = ir.DataType.FLOAT16
            target = self._pool(pool.scale_input, group, heads, pool.scales, half)
            scales = self._write(target, new_scales, group, pool.scale_output)
        dtype = ir.DataType.from_numpy(np.dtype(pool.dtype))
        fresh = self._pool(state.input, group, heads, pool.stored_channels, dtype, replaces=old)
        return _Stored(pool, self._write(fresh, new, group, state.output), scales)

    def _copy(self, state: State, new: ir.Value | None, group: CacheGroup) -> _Stored:
        """Write new positions to the pool of the newest ones, as they are."""
        heads, channels = dim(new, 1), dim(new, 3)
        assert new is not None
        assert heads is not None
        assert channels is not None
        names = f"{state.input}.recent", f"{state.output}.recent"
        pool = CachePool(state.name, group.name, heads, channels, 0, *names, copy=True)
        target = self._pool(pool.input, group, heads, channels, ir.DataType.FLOAT)
        return _Stored(pool, self._write(target, new, group, pool.output), None)

    def _write(
        self, pool: ir.Value, new: ir.Value, group: CacheGroup, output: str
    ) -> ir.Value:  # fmt: skip
        written = self.edit.op(
            CACHE_WRITE, [pool, new, *self._described(group)], like=pool, domain=HAL_DOMAIN
        )
        outputs = self.graph.graph.outputs
        for index, value in enumerate(outputs):
            if value.name == output:
                value.name = self.edit.fresh(f"{output}_grown")
                outputs[index] = written
                break
        else:
            outputs.append(written)
        written.name = output
        return written

    def _quantized(self, x: ir.Value, bits: int, block: int) -> tuple[ir.Value, ir.Value]:
        """Codes and scales: the largest magnitude in a block of channels gets the largest code."""
        edit, top = self.edit, TOP[bits]
        assert x.shape is not None
        channels = x.shape[3]
        assert isinstance(channels, int)
        blocks, axis = ir.Shape([*x.shape[:3], channels // block, block]), [4]
        rows, ranks = ir.Shape([*x.shape[:3], channels // block]), x.type
        split = edit.constant([0, 0, 0, channels // block, block], "blocks", np.int64)
        apart = self._typed("Reshape", [x, split], blocks, ranks)
        last = edit.constant(axis, "axes", np.int64)
        size = self._typed("Abs", [apart], blocks, ranks)
        peak = self._typed("ReduceMax", [size, last], rows, ranks, {"keepdims": 0})
        ratio = self._typed("Div", [peak, edit.constant(np.float32(top))], rows, ranks)
        ratio = self._typed(
            "Max", [ratio, edit.constant(np.float32(SMALLEST_SCALE), "tiny")], rows, ranks
        )
        half = ir.TensorType(ir.DataType.FLOAT16)
        scale = self._typed("Cast", [ratio], rows, half, {"to": ir.DataType.FLOAT16.value})
        wide = self._typed("Cast", [scale], rows, ranks, {"to": ir.DataType.FLOAT.value})
        wide = self._typed("Unsqueeze", [wide, last], ir.Shape([*rows, 1]), ranks)
        code = self._typed("Round", [edit.op("Div", [apart, wide], like=apart)], blocks, ranks)
        limits = [edit.constant(np.float32(n), "limit") for n in (-top, top)]
        code = self._typed("Clip", [code, *limits], blocks, ranks)
        joined = edit.constant([0, 0, 0, channels], "joined", np.int64)
        code = self._typed("Reshape", [code, joined], x.shape, ranks)
        if bits == 8:
            whole = ir.TensorType(ir.DataType.INT8)
            code = self._typed("Cast", [code], x.shape, whole, {"to": ir.DataType.INT8.value})
            return code, scale
        return self._packed(code), scale

    def _typed(
        self, op: str, inputs: Sequence[Any], shape: Any, kind: Any, attributes: Any = None
    ) -> ir.Value:
        made = self.edit.op(op, inputs, attributes)
        made.shape, made.type = shape, kind
        return made

    def _packed(self, code: ir.Value) -> ir.Value:
        """Codes -7..7, raised by 8, two in a byte: channel c low, channel c + C/2 high."""
        edit, channels = self.edit, dim(code, 3)
        assert channels is not None
        assert code.shape is not None
        half = ir.Shape([*code.shape[:3], channels // 2])
        axis, raised = edit.constant([3], "axes", np.int64), edit.constant(np.float32(8))
        sides = []
        for start in (0, channels // 2):
            bounds = [edit.constant([n], "bound", np.int64) for n in (start, start + channels // 2)]
            side = edit.op("Slice", [code, *bounds, axis])
            side.shape, side.type = half, code.type
            sides.append(edit.op("Add", [side, raised], like=side))
        high = edit.op("Mul", [sides[1], edit.constant(np.float32(16))], like=sides[1])
        both = edit.op("Add", [sides[0], high], like=high)
        packed = edit.op("Cast", [both], {"to": ir.DataType.UINT8.value})
        packed.shape, packed.type = half, ir.TensorType(ir.DataType.UINT8)
        return packed

    # -- inputs -----------------------------------------------------------------------------------

    def _group(self, name: str, window: int, past: ir.Value) -> CacheGroup:
        if name not in self.groups:
            lengths = f"hal.lengths.{name}" if window else PAST
            group = CacheGroup(name, window, lengths, f"hal.table.{name}")
            self.groups[name] = group
            self.lengths[group.lengths] = (
                self._input(lengths, ir.DataType.INT64, [self.batch]) if window else past
            )
            self._input(group.table, ir.DataType.INT32, [self.batch, f"blocks_{name}"])
        return self.groups[name]

    def _described(self, group: CacheGroup) -> list[ir.Value]:
        return [self.inputs[group.table], self.lengths[group.lengths]]

    def _pool(
        self,
        name: str,
        group: CacheGroup,
        heads: int,
        channels: int,
        dtype: ir.DataType,
        replaces: ir.Value | None = None,
    ) -> ir.Value:
        dims = [f"pages_{group.name}", heads, f"page_{group.name}", channels]
        if replaces is None:
            return self._input(name, dtype, dims)
        # The old value still feeds the attention that is going; it leaves with it.
        replaces.name = self.edit.fresh(f"{name}_grown")
        return self._input(name, dtype, dims)

    def _input(self, name: str, dtype: ir.DataType, dims: Sequence[Any]) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(list(dims)))
        self.graph.graph.inputs.append(value)
        self.inputs[name] = value
        return value

    def _drop_inputs(self) -> None:
        inputs = self.graph.graph.inputs
        gone = [v for v in inputs if (v.name or "").endswith("_grown") and not v.uses()]
        for value in gone:
            inputs.remove(value)
