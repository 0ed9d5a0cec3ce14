"""Figures of a descriptor that are possible and yet look like another one: they are warned of.

What cannot be is refused when the descriptor is read (:mod:`hal.descriptor`). Here are the two
mistakes that data sheets invite: the bandwidth of a link between devices given as that of memory,
and a rate with structured sparsity given as a dense one. Each warning says what was seen.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from hal.descriptor import Descriptor, MemoryLevel, Quantity

LINKS = re.compile(
    r"(?<![a-z0-9])(pci[ -]?e(xpress)?|pci express|cxl|nvlink|nvswitch|nvlink-c2c|xgmi"
    r"|infinity fabric|hccs|hccl|ualink|mlu-?link|b-?link|mtlink|metaxlink|xe ?link|ici|upi|qpi"
    r"|ethernet|infiniband|roce|rdma|thunderbolt|usb|interconnect|card-to-card|chip-to-chip)(?![a-z0-9])",
    re.IGNORECASE,
)
"""Words for what leads to other devices; a level of memory is named otherwise."""

SPARSE = re.compile(r"spars\w*|(?<!\d)2:4(?!\d)", re.IGNORECASE)
"""Words of a source that counts structured zeros."""

DENSE = re.compile(r"dense|half|halved|without|no spars|not spars|non-?spars", re.IGNORECASE)
"""Words by which a source that speaks of sparsity says that it is not counted."""

_NEAR = 0.005
"""Two figures are the same, or one is twice the other, within this share: sources round."""


def doubts(described: Descriptor) -> list[str]:
    """What looks wrong in a descriptor, each in a sentence that names the field; often nothing."""
    return [*_links_as_memory(described), *_sparse_as_dense(described)]


def _links_as_memory(described: Descriptor) -> Iterator[str]:
    links = [level for level in described.memory if level.kind == "link"]
    for level in described.memory:
        if level.kind != "main" or level.bandwidth is None:
            continue
        place = f"memory level {level.level!r}"
        if found := LINKS.search(level.level):
            yield f'{place} is named as the link {found[0]!r}; if it is one, say kind = "link"'
        elif found := LINKS.search(level.bandwidth.source):
            yield (
                f"{place}: the source of its bandwidth speaks of {found[0]!r}: "
                f"is {_text(level.bandwidth)} that of a link and not of memory?"
            )
        for link in links:
            if link.bandwidth is not None and _same(_rate(level), _rate(link)):
                yield (
                    f"{place}: its bandwidth of {_text(level.bandwidth)} is that of the link "
                    f"{link.level!r}: is it that of memory?"
                )


def _rate(level: MemoryLevel) -> float:
    return level.bandwidth.base if level.bandwidth else 0.0


def _sparse_as_dense(described: Descriptor) -> Iterator[str]:
    for dtype, figure in described.peaks.items():
        if figure is None or figure.basis == "sparse":
            continue
        counted = "as dense" if figure.basis else "without a basis"
        place = f"peak.{dtype}: {_text(figure)} is given {counted}"
        if (found := SPARSE.search(figure.source)) and not DENSE.search(figure.source):
            yield (
                f"{place}, and its source speaks of {found[0]!r}: if zeros are counted, say "
                'basis = "sparse"'
            )
        for other in figure.alternatives:
            if described.kind in ("gpu", "npu") and _is_twice(figure, other):
                yield (
                    f"{place}, twice the {_text(other)} of another source ({other.source}): "
                    "does it count sparsity?"
                )
    yield from _eight_bits(described)


def _eight_bits(described: Descriptor) -> Iterator[str]:
    """Accelerators do 8-bit arithmetic at twice their 16-bit rate; four times looks like sparsity.

    Processors are left out: their 8-bit dot products are often four times as fast. So is a rate
    that another source gives as a dense one, of any 8-bit type: some chips halve 16-bit rates.
    """
    if described.kind not in ("gpu", "npu"):
        return
    names = ("int8", "float8", "float8e4m3", "float8e5m2")
    found = [figure for name in names if (figure := described.peaks.get(name)) is not None]
    told = [a for figure in found for a in figure.alternatives if a.basis == "dense"]
    for narrow in names:
        for wide in ("float16", "bfloat16"):
            small, large = described.peaks.get(wide), described.peaks.get(narrow)
            if small is None or large is None or small.dimension != large.dimension:
                continue
            if {small.basis, large.basis} & {"sparse"} or not small.base:
                continue
            if any(_same(large.base, other.base) for other in told):
                continue
            if _same(large.base, 4 * small.base):
                yield (
                    f"peak.{narrow}: {_text(large)} is given as dense and is four times "
                    f"peak.{wide} ({_text(small)}), where twice is usual: does it count sparsity?"
                )
                return


def _is_twice(figure: Quantity, other: Quantity) -> bool:
    """Whether a figure is twice what another source says of the same thing, both dense."""
    return other.basis != "sparse" and other.base > 0 and _same(figure.base, 2 * other.base)


def _same(one: float, other: float) -> bool:
    return abs(one - other) <= _NEAR * max(abs(one), abs(other))


def _text(figure: Quantity) -> str:
    return f"{figure.value:g} {figure.unit}"
