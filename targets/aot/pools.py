"""Pools of a cache that a program keeps in its own memory.

The caller of a segment has the pools as arrays, and may look into them or change them between
calls. A program does not take and give them whole: it writes new positions into its own pools, and
gives those positions, which are written into the caller's arrays here. Only pools that the caller
changed are sent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from hal.ir import Graph
from hal.ir.cache_ops import CACHE_WRITE
from hal.ir.cache_plan import in_place


@dataclasses.dataclass(frozen=True)
class KeptPool:
    """A pool: names of its input and output, of the new positions, and of what says where they go.

    ``update`` float or codes ``[batch, heads, tokens, channels]``; ``table`` int32 ``[batch,
    blocks]`` and ``lengths`` int64 ``[batch]`` are inputs of the segment.
    """

    input: str
    output: str
    update: str
    table: str
    lengths: str

    def write(self, pool: np.ndarray, update: np.ndarray, inputs: Mapping[str, Any]) -> None:
        """Write the new positions into ``pool [pages, heads, page, channels]``."""
        lengths = np.asarray(inputs[self.lengths])
        position = lengths[:, None] + np.arange(update.shape[2])
        pages = np.take_along_axis(np.asarray(inputs[self.table]), position // pool.shape[2], 1)
        pool[pages, :, position % pool.shape[2]] = update.transpose(0, 2, 1, 3)


def keep_pools(graph: Graph) -> tuple[Graph, list[KeptPool]]:
    """A copy of a segment that gives new positions where ``graph`` gives whole pools.

    A pool that is written here, and where, has to be known from the segment's inputs; others stay.
    """
    graph = graph.clone()
    body, kept = graph.graph, []
    inputs = {v.name: v for v in body.inputs}
    outputs = {v.name: place for place, v in enumerate(body.outputs)}
    for output, source in in_place(graph).items():
        place = outputs[output]
        node = body.outputs[place].producer()
        if node is None or node.op_type != CACHE_WRITE or node.inputs[0] is not inputs[source]:
            continue
        update, table, lengths = node.inputs[1:4]
        assert update is not None
        assert table is not None
        assert lengths is not None
        if table.name not in inputs or lengths.name not in inputs or not update.name:
            continue
        body.outputs[place] = update
        kept.append(KeptPool(source, output, update.name, table.name or "", lengths.name or ""))
    return graph, kept
