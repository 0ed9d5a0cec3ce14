"""Recognise causal and sliding-window masks by computing them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import sympy

from hal.ir import Graph
from hal.passes._edit import (
    Editor,
    attribute,
    producer,
    rank,
    remove_unused,
    scalar,
)
from hal.passes._program import Program, program_of
from hal.passes._symbolic import Shapes, analyse
from hal.passes.attention import MASKED
from hal.passes.base import Outcome, Pass

WINDOW_KEY = "hal.window"
"""Metadata of an ``Attention`` node whose mask lets position ``p`` see ``p - window + 1 … p``."""

CAUSAL_KEY = "hal.causal"
"""Metadata of an ``Attention`` node whose mask is the causal one, aligned to the last key."""

REACHES = (300, 1_500, 5_000, 40_000)
"""Keys to look back when telling a window from a causal mask. The first is taken that is wider than
any constant in the mask's computation; where none is, the mask stays as it is."""

BUDGET = 2**25
"""Elements of the largest tensor that a mask's computation may make here."""


@dataclasses.dataclass(frozen=True)
class CausalMask(Pass):
    """Find out what a mask is by evaluating it, not by how it is computed.

    A mask that depends on nothing but shapes is computed for several lengths of batch, sequence and
    past. If it is exactly "key <= past + query" it is dropped for ``is_causal``; if it is a causal
    window it becomes a shared boolean mask and the node says so in its metadata; if it masks
    nothing it is dropped. Preserves results up to rounding. ``is_causal`` counts the past by the
    op's ``past_key``, so without it a mask over more keys than queries stays (marked in the
    metadata).
    """

    name: ClassVar[str] = "causal_mask"

    def run(self, graph: Graph) -> Outcome:
        """Classify the mask of every ``Attention`` and act on it."""
        shapes = analyse(graph)
        edit = Editor(graph)
        counts: dict[str, int] = {}
        known: dict[tuple[Any, ...], _Kind | None] = {}
        for node in list(graph.nodes()):
            if node.op_type != "Attention" or node.domain or len(node.inputs) < 4:
                continue
            edit.at(node)
            done = _apply(edit, node, shapes, known)
            if done is not None:
                counts[done] = counts.get(done, 0) + 1
        remove_unused(graph)
        return Outcome(sum(counts.values()), counts)


@dataclasses.dataclass(frozen=True)
class _Kind:
    """``causal`` up to the query's own position; ``window`` keys at most, 0 for no limit."""

    causal: bool
    window: int = 0


def _apply(
    edit: Editor, node: ir.Node, shapes: Shapes, known: dict[tuple[Any, ...], _Kind | None]
) -> str | None:
    mask = node.inputs[3]
    lengths = _lengths(node, shapes)
    if mask is None or lengths is None or attribute(node, "is_causal", 0):
        return None
    if WINDOW_KEY in node.metadata_props or CAUSAL_KEY in node.metadata_props:
        return None
    query, past, aligned = lengths
    key = (id(mask), query, past)
    if key not in known:
        known[key] = _classify(mask, query, past, shapes, _past_symbols(edit.graph, shapes))
    kind = known[key]
    if kind is None:
        return None
    if not kind.causal:
        node.replace_input_with(3, None)
        return "nothing masked"
    if kind.window:
        node.metadata_props[WINDOW_KEY] = str(kind.window)
        _as_boolean(node, mask)
        return f"window {kind.window}"
    if not aligned:
        node.metadata_props[CAUSAL_KEY] = "1"
        _as_boolean(node, mask)
        return "causal, kept"
    node.replace_input_with(3, None)
    node.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)
    return "causal"


def _as_boolean(node: ir.Node, mask: ir.Value) -> None:
    """Use the condition of ``where(condition, 0, -inf)``; no row of these masks is empty."""
    where = producer(mask, "Where")
    if where is None or where.inputs[0] is None or scalar(where.inputs[1]) != 0.0:
        return
    fill = scalar(where.inputs[2])
    if fill is None or fill > MASKED or where.inputs[0].shape is None or mask.shape is None:
        return
    condition = where.inputs[0]
    expand = producer(condition, "Expand")
    if expand is not None and expand.inputs[0] is not None:
        condition = expand.inputs[0]
    if condition.shape is None or not _covers(condition.shape, mask.shape):
        return
    node.replace_input_with(3, condition)


def _covers(condition: ir.Shape, mask: ir.Shape) -> bool:
    """The last two extents are equal, or at least are not known to be broadcast."""
    pairs = list(zip(condition[-2:], mask[-2:], strict=False))
    return len(pairs) == 2 and all(a != 1 and (a == b or not isinstance(b, int)) for a, b in pairs)


def _lengths(node: ir.Node, shapes: Shapes) -> tuple[Any, Any, bool] | None:
    """Query length, past length, and whether ``is_causal`` would count the same past."""
    q, k = node.inputs[0], node.inputs[1]
    past = node.inputs[4] if len(node.inputs) > 4 else None
    if q is None or k is None or rank(q) != 4 or len(node.inputs) > 6:
        return None
    q_shape, k_shape = shapes.shape.get(q), shapes.shape.get(k)
    if q_shape is None or k_shape is None:
        return None
    if past is None:
        length = sympy.expand(k_shape[2] - q_shape[2])
        return q_shape[2], length, length == 0
    past_shape = shapes.shape.get(past)
    if past_shape is None or q_shape[2] != k_shape[2]:
        return None
    return q_shape[2], past_shape[2], True


def _past_symbols(graph: Graph, shapes: Shapes) -> frozenset[Any]:
    """Names of past lengths. They are one length: a mask that fits one layer must fit them all."""
    found: set[Any] = set()
    for node in graph.nodes():
        if node.op_type == "Attention" and not node.domain:
            for past in node.inputs[4:6]:
                if past is not None and past in shapes.shape:
                    found |= shapes.shape[past][2].free_symbols
    return frozenset(found)


# --- evaluation --------------------------------------------------------------------------------


def _classify(
    mask: ir.Value, query: Any, past: Any, shapes: Shapes, pasts: frozenset[Any]
) -> _Kind | None:
    program = program_of(mask, shapes)
    if program is None or query.atoms(sympy.Dummy) or past.atoms(sympy.Dummy):
        return None
    kinds: set[_Kind | None] = set()
    symbols = program.symbols | query.free_symbols | past.free_symbols
    for lengths in _bindings(program, query, past, pasts):
        values = _bind(symbols, query, pasts | past.free_symbols, lengths)
        length, offset = int(query.subs(values)), int(past.subs(values))
        if offset < 0:
            continue
        allowed = _allowed(program, values)
        if allowed is None:
            return None
        if not _is_telling(allowed, length):
            continue
        kinds.add(_kind_of(allowed, length, offset))
    return _agree(kinds)


def _is_telling(allowed: np.ndarray, query: int) -> bool:
    """False where a causal mask and no mask are the same: one query that sees all keys."""
    return query > 1 or not bool(allowed.all())


def _agree(kinds: set[_Kind | None]) -> _Kind | None:
    """A window shows only where enough keys precede: it wins over ``causal`` seen on short ones."""
    if None in kinds or not kinds:
        return None
    causal = {k.causal for k in kinds if k is not None}
    windows = {k.window for k in kinds if k is not None and k.window}
    if len(causal) != 1 or len(windows) > 1:
        return None
    return _Kind(causal.pop(), windows.pop() if windows else 0)


def _kind_of(allowed: np.ndarray, query: int, past: int) -> _Kind | None:
    """Compare a mask ``[…, query, past + query]`` with the masks we know."""
    total = past + query
    try:
        rows = np.broadcast_to(allowed, (*allowed.shape[:-2], query, total))
    except ValueError:
        return None
    rows = rows.reshape(-1, query, total)
    if rows.all():
        return _Kind(False)
    position = past + np.arange(query)[:, None]
    keys = np.arange(total)[None, :]
    causal = keys <= position
    if (rows == causal).all():
        return _Kind(True)
    window = int(rows[0, -1].sum())
    if window and (rows == (causal & (keys > position - window))).all():
        return _Kind(True, window)
    return None


LENGTHS = ((1, 1, 0), (1, 5, 0), (2, 3, 4), (1, 1, 7), (3, 6, 33), (1, 90, 0), (1, 17, 300))
"""Batch, sequence and past at which masks are computed; the farthest is added to these."""


def _bindings(
    program: Program, query: Any, past: Any, pasts: frozenset[Any]
) -> list[tuple[int, int, int]]:
    """Lengths to try: within the tables the mask reads, and far enough to see any window.

    Empty when a window could be wider than what can be computed.
    """
    usual = [b for b in LENGTHS if b[1] + b[2] <= program.limit]
    symbols = program.symbols | query.free_symbols | past.free_symbols
    for reach in REACHES:
        extent = min(reach, program.limit - 2)
        far = (1, 2, extent) if past.free_symbols else (1, extent, 0)
        values = _bind(symbols, query, pasts | past.free_symbols, far)
        if _peak(program, values) > BUDGET:
            break
        if extent >= program.widest + 50 or extent < reach:
            return [*usual, far]
    return []


def _peak(program: Program, values: Mapping[Any, int]) -> int:
    """Elements of the largest tensor that computing the mask would make."""
    sizes = [1]
    for extents in program.shapes:
        bound = [e.subs(values) for e in extents]
        sizes.append(math.prod(int(e) for e in bound if e.is_Integer))
    return max(sizes)


def _bind(
    symbols: Iterable[Any], query: Any, pasts: frozenset[Any], lengths: tuple[int, int, int]
) -> dict[Any, int]:
    """Numbers for all symbols: the query's, those of any past, and all others as the batch."""
    batch, sequence, before = lengths
    values = dict.fromkeys(symbols, batch)
    values.update(dict.fromkeys(pasts, before))
    values.update(dict.fromkeys(query.free_symbols, sequence))
    return values


def _allowed(program: Program, values: Mapping[Any, int]) -> np.ndarray | None:
    """The mask as booleans, or None if it is neither a boolean nor a 0 / -inf mask."""
    mask = program.evaluate(values)
    if mask is None:
        return None
    if mask.ndim < 2:
        mask = np.broadcast_to(mask, (1, *mask.shape)) if mask.ndim else mask.reshape(1, 1)
    if mask.dtype == np.bool_:
        return mask
    if not ((mask == 0) | (mask <= MASKED)).all():
        return None
    return np.asarray(mask == 0)
