"""What a weight may be stored as, and the text that asks for it.

    >>> parse_recipe("w4a16-g32:gptq, head=w8a16, embedding=float")

A *format* is the dtype of the codes, the length of a block along the input axis and whether the
blocks have zero points; ``a8`` says that activations are rounded to 8 bits before the product. A
*setting* is a format and the method that finds the codes. A *recipe* gives each kind of layer its
setting.
"""

from __future__ import annotations

import dataclasses
import re

import onnx_ir as ir

from hal.errors import InputError, did_you_mean

METHODS = ("rtn", "hqq", "gptq", "awq")
"""How codes are found; ``rtn`` and ``hqq`` look at the weights only."""

DATA_FREE = ("rtn", "hqq")

KINDS = ("linear", "embedding", "head", "experts")
"""Kinds of layers that a recipe may treat differently; the others follow ``linear``."""

_SIGNED = {
    8: ir.DataType.INT8,
    4: ir.DataType.INT4,
    3: ir.DataType.INT8,
    2: ir.DataType.INT2,
}
_UNSIGNED = {
    8: ir.DataType.UINT8,
    4: ir.DataType.UINT4,
    3: ir.DataType.UINT8,
    2: ir.DataType.UINT2,
}
_GROUPS = (16, 32, 64, 128, 256)
_WORD = re.compile(r"w(8|4|3|2)(?:a(8|16))?$")
_HINT = (
    "as in w4a16-g32:gptq: w8|w4|w3|w2 or ternary, a16|a8, -g32 or -channel, -sym|-asym, :method"
)


@dataclasses.dataclass(frozen=True)
class Format:
    """How one weight is stored.

    Attributes:
        bits: bits of a code; three-bit codes are packed by ``hal::UnpackBits``.
        group: elements along the input axis that share a scale; 0: the whole axis.
        symmetric: signed codes without zero points; otherwise unsigned ones with.
        activations: 16 leaves the activations as they are, 8 rounds them in blocks of ``group``.
        ternary: codes are -1, 0 and 1 only (two bits each).
    """

    bits: int
    group: int = 32
    symmetric: bool = True
    activations: int = 16
    ternary: bool = False

    @property
    def lowest(self) -> int:
        """The smallest code less its zero point, for symmetric formats."""
        return -1 if self.ternary else -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """The largest code less its zero point, for symmetric formats."""
        return 1 if self.ternary else (1 << (self.bits - 1)) - 1

    @property
    def levels(self) -> int:
        """The largest unsigned code."""
        return (1 << self.bits) - 1

    @property
    def dtype(self) -> ir.DataType:
        """Dtype of the codes in the graph; three-bit codes are bytes once unpacked."""
        return (_SIGNED if self.symmetric else _UNSIGNED)[self.bits]

    def __str__(self) -> str:
        """The text that :func:`parse_format` reads."""
        word = "ternary" if self.ternary else f"w{self.bits}"
        word += f"a{self.activations}"
        group = f"-g{self.group}" if self.group else "-channel"
        return word + group + ("" if self.symmetric else "-asym")


@dataclasses.dataclass(frozen=True)
class Setting:
    """A format, and the method that finds its codes."""

    format: Format
    method: str = "rtn"

    def __str__(self) -> str:
        """The text that :func:`parse_setting` reads."""
        return f"{self.format}:{self.method}"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A setting for each kind of layer; None keeps a kind as it is."""

    linear: Setting | None
    embedding: Setting | None = None
    head: Setting | None = None
    experts: Setting | None = None

    def setting(self, kind: str) -> Setting | None:
        """The setting of layers of ``kind``."""
        found: Setting | None = getattr(self, kind)
        return found

    def __str__(self) -> str:
        """The text that :func:`parse_recipe` reads."""
        parts = [str(self.linear or "float")]
        for kind in KINDS[1:]:
            if self.setting(kind) != self.linear:
                parts.append(f"{kind}={self.setting(kind) or 'float'}")
        return ",".join(parts)


def parse_format(text: str) -> Format:
    """Read ``w4a16-g32``, ``w8-channel``, ``ternary-g64``, ….

    The default group is 32, the default activations are 16 bits.

    Raises:
        InputError: it is no format.
    """
    word, *options = text.strip().lower().split("-")
    found = _WORD.match(word)
    ternary = re.match(r"ternary(?:a(8|16))?$", word)
    if not found and not ternary:
        known = [f"w{b}a{a}" for b in (8, 4, 3, 2) for a in (16, 8)] + ["ternary"]
        raise InputError(f"no weight format {word!r}", f"{did_you_mean(word, known)}; {_HINT}")
    bits = int(found[1]) if found else 2
    activations = int((found[2] if found else ternary[1] if ternary else None) or 16)
    group, symmetric = 32, True
    for option in options:
        if option == "channel":
            group = 0
        elif option in ("sym", "asym"):
            symmetric = option == "sym"
        elif re.fullmatch(r"g\d+", option):
            group = int(option[1:])
            if group not in _GROUPS:
                raise InputError(
                    f"a group of {group} weights", f"groups are {', '.join(map(str, _GROUPS))}"
                )
        else:
            raise InputError(f"{text!r}: what is {option!r}?", _HINT)
    if ternary and not symmetric:
        raise InputError(f"{text!r}: ternary codes have no zero points", "leave -asym out")
    return Format(bits, group, symmetric, activations, bool(ternary))


def parse_setting(text: str) -> Setting | None:
    """Read ``FORMAT[:METHOD]``, or ``float`` for no quantization (None).

    Raises:
        InputError: it is neither.
    """
    if text.strip().lower() == "float":
        return None
    name, colon, method = text.strip().lower().partition(":")
    if colon and method not in METHODS:
        raise InputError(f"no method {method!r}", did_you_mean(method, METHODS))
    return Setting(parse_format(name), method or "rtn")


def parse_recipe(text: str) -> Recipe:
    """Read ``SETTING[, KIND=SETTING …]``, kinds ``embedding``, ``head`` and ``experts``.

    Experts follow the first setting, symmetric, and with one scale a row from 8 bits up. Embedding
    and head follow it from 8 bits up; below, they are kept at 8 bits with the same activations,
    since they carry most of the damage for few bytes.

    Raises:
        InputError: a part does not parse.
    """
    first, *others = text.split(",")
    linear = parse_setting(first)
    kept = linear
    if linear is not None and linear.format.bits < 8:
        kept = Setting(Format(8, 32, True, linear.format.activations))
    embedding = kept
    if kept is not None:
        embedding = dataclasses.replace(
            kept, format=dataclasses.replace(kept.format, activations=16)
        )
    experts = linear
    if experts is not None:
        group = 0 if experts.format.bits == 8 else experts.format.group
        plain = dataclasses.replace(experts.format, group=group, symmetric=True, activations=16)
        experts = dataclasses.replace(experts, format=plain)
    recipe = Recipe(linear, embedding, kept, experts)
    for other in others:
        kind, equals, setting = other.partition("=")
        kind = kind.strip().lower()
        if not equals or kind not in KINDS[1:]:
            raise InputError(
                f"{other.strip()!r} is no KIND=FORMAT",
                f"{did_you_mean(kind, KINDS[1:])}; as in head=w8a16 or embedding=float",
            )
        recipe = dataclasses.replace(recipe, **{kind: parse_setting(setting)})
    return recipe
