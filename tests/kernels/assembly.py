"""Reading assembly in AT&T syntax: what it uses, and what a descriptor lets it use."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator

from hal.descriptor import Descriptor

_LABEL = re.compile(r"^(\.?[\w$.]+):")
_JUMP = re.compile(r"^j\w+\s+(\.?[\w$.]+)$")
_WIDTHS = {"xmm": 128, "ymm": 256, "zmm": 512}
_FUSED = re.compile(r"^vfn?m(add|sub)")
_DOT = re.compile(r"^vpdpb")


@dataclasses.dataclass(frozen=True)
class Line:
    """An instruction, or the label that jumps go to."""

    text: str

    @property
    def mnemonic(self) -> str:
        """Its name, without prefixes such as ``{vex}``."""
        words = [word for word in self.text.split() if not word.startswith("{")]
        return words[0]

    @property
    def width(self) -> int:
        """Bits of the widest register that it names; 0 where it names none."""
        return max((b for r, b in _WIDTHS.items() if f"%{r}" in self.text), default=0)


def lines(assembly: str) -> Iterator[Line]:
    """Instructions and labels, comments and directives left out."""
    for raw in assembly.splitlines():
        text = raw.split("#")[0].strip()
        if text and (_LABEL.match(text) or not text.startswith(".")):
            yield Line(text)


def inner_loops(assembly: str) -> list[list[Line]]:
    """Bodies of loops without loops in them: from a label to a jump back to it."""
    body, labels, loops = list(lines(assembly)), {}, []
    for place, line in enumerate(body):
        label, jump = _LABEL.match(line.text), _JUMP.match(line.text)
        if label:
            labels[label.group(1)] = place
        elif jump and jump.group(1) in labels:
            loops.append((labels[jump.group(1)], place))
    return [
        body[first:last]
        for first, last in loops
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in loops)
    ]


@dataclasses.dataclass(frozen=True)
class Allowed:
    """What a descriptor lets code use."""

    bits: int
    dot: bool
    bfloat: bool
    fused: bool

    @classmethod
    def by(cls, descriptor: Descriptor) -> Allowed:
        """As its vectors and the instructions it offers say."""
        offered = [
            (i.does, i.types[0]) for i in descriptor.offered() if i.types and i.k in (1, 2, 4)
        ]
        dots = [i for i in descriptor.offered() if i.does == "dot" and i.k == 4]
        return cls(
            max(128, descriptor.vector.bits),
            bool(dots),
            ("dot", "bf16") in offered,
            ("fma", "f32") in offered,
        )

    def violations(self, assembly: str) -> list[str]:
        """Instructions that the descriptor does not allow."""
        return [line.text for line in lines(assembly) if not self.allows(line)]

    def allows(self, line: Line) -> bool:
        """Whether the descriptor has this instruction."""
        name, label = line.mnemonic, _LABEL.match(line.text)
        if label:
            return True
        masked = bool(re.search(r"%k[0-7]|\{1to\d+\}|%[xy]mm(1[6-9]|[23]\d)", line.text))
        return not (
            line.width > self.bits
            or (self.bits < 256 and name.startswith("v"))
            or (self.bits < 512 and masked)
            or (not self.dot and _DOT.match(name))
            or (not self.bfloat and name.startswith("vdpbf16"))
            or (not self.fused and _FUSED.match(name))
            or "%tmm" in line.text
        )

    def multiplies(self, line: Line, *, integer: bool) -> bool:
        """Whether this is the multiplication that an inner loop should have at full width."""
        if line.width != self.bits:
            return False
        if integer:
            return bool(_DOT.match(line.mnemonic))
        return bool(_FUSED.match(line.mnemonic)) if self.fused else line.mnemonic == "mulps"


def multiplications(assembly: str, allowed: Allowed, *, integer: bool = False) -> int:
    """Most multiplications of full width in one inner loop, in the way the descriptor offers."""
    counts = [
        sum(allowed.multiplies(line, integer=integer) for line in loop)
        for loop in inner_loops(assembly)
    ]
    return max(counts, default=0)


def names(found: Iterable[str]) -> set[str]:
    """Mnemonics, for short messages."""
    return {Line(text).mnemonic for text in found}
