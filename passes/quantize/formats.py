"""What a weight may be stored as, and the text that asks for it.

    >>> parse_recipe("w4a16-g32:gptq, head=w8a16, embedding=float")

A *format* is the dtype of the codes, the length of a block along the input axis and whether the
blocks have zero points; ``a8`` says that activations are rounded to 8 bits before the product.
``fp8`` and ``mxfp4`` are codes that are small floats themselves. A
*setting* is a format and the method that finds the codes. A *recipe* gives each kind of layer its
setting.
"""

from __future__ import annotations

import dataclasses
import re

import onnx_ir as ir

from hal.errors import InputError, did_you_mean

METHODS = ("rtn", "hqq", "gptq", "awq", "smooth")
"""How codes are found; ``rtn`` and ``hqq`` look at the weights only."""

DATA_FREE = ("rtn", "hqq")

SCALING = ("awq", "smooth")
"""Methods that divide a layer's input by channel, where it is made, and then round to nearest."""

KINDS = ("linear", "embedding", "head", "experts", "conv")
"""Kinds of layers that a recipe may treat differently; the others follow ``linear``."""

CONV_BITS = (8, 4)
"""Bits that the weights of convolutions may take."""

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
_FLOATS = {"fp8": (8, ir.DataType.FLOAT8E4M3FN), "mxfp4": (4, ir.DataType.FLOAT4E2M1)}
_LARGEST = {"fp8": 448, "mxfp4": 6}
_GROUPS = (16, 32, 64, 128, 256)
_WORD = re.compile(r"(w8|w4|w3|w2|ternary|fp8|mxfp4)(?:a(8|16))?$")
_HINT = (
    "as in w4a16-g32:gptq: w8|w4|w3|w2, ternary, fp8 or mxfp4, a16|a8, -g32 or -channel,"
    " -sym|-asym, -static, :method"
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
        code: what a code is: an ``integer``; ``fp8``, a float of 8 bits (E4M3); ``mxfp4``, a float
            of 4 bits (E2M1) whose scales are powers of two, as the OCP Microscaling formats say.
        static: activations have one scale and zero point for each tensor, found on calibration
            data, and not one for each block, found in every call.
    """

    bits: int
    group: int = 32
    symmetric: bool = True
    activations: int = 16
    ternary: bool = False
    code: str = "integer"
    static: bool = False

    @property
    def integer(self) -> bool:
        """Whether codes are integers."""
        return self.code == "integer"

    @property
    def lowest(self) -> int:
        """The smallest code less its zero point, for symmetric formats."""
        if not self.integer:
            return -_LARGEST[self.code]
        return -1 if self.ternary else -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """The largest code less its zero point, for symmetric formats."""
        if not self.integer:
            return _LARGEST[self.code]
        return 1 if self.ternary else (1 << (self.bits - 1)) - 1

    @property
    def levels(self) -> int:
        """The largest unsigned code."""
        return (1 << self.bits) - 1

    @property
    def dtype(self) -> ir.DataType:
        """Dtype of the codes in the graph; three-bit codes are bytes once unpacked."""
        if not self.integer:
            return _FLOATS[self.code][1]
        return (_SIGNED if self.symmetric else _UNSIGNED)[self.bits]

    @property
    def scale_dtype(self) -> ir.DataType:
        """Dtype of the scales in the graph."""
        return ir.DataType.FLOAT8E8M0 if self.code == "mxfp4" else ir.DataType.FLOAT16

    def __str__(self) -> str:
        """The text that :func:`parse_format` reads."""
        word = "ternary" if self.ternary else f"w{self.bits}" if self.integer else self.code
        word += f"a{self.activations}"
        group = f"-g{self.group}" if self.group else "-channel"
        word += group + ("" if self.symmetric else "-asym")
        return word + ("-static" if self.static else "")


@dataclasses.dataclass(frozen=True)
class Setting:
    """A format, and the method that finds its codes.

    ``rotate`` asks for residual streams to be turned first, which concerns the whole model.
    """

    format: Format
    method: str = "rtn"
    rotate: bool = False

    @property
    def how(self) -> str:
        """The method with its options."""
        return f"{self.method}+rotate" if self.rotate else self.method

    def __str__(self) -> str:
        """The text that :func:`parse_setting` reads."""
        return f"{self.format}:{self.how}"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A setting for each kind of layer; None keeps a kind as it is."""

    linear: Setting | None
    embedding: Setting | None = None
    head: Setting | None = None
    experts: Setting | None = None
    conv: Setting | None = None
    named: frozenset[str] = dataclasses.field(default=frozenset(), compare=False)
    """Kinds that were named one by one."""

    def setting(self, kind: str) -> Setting | None:
        """The setting of layers of ``kind``."""
        found: Setting | None = getattr(self, kind)
        return found

    def __str__(self) -> str:
        """The text that :func:`parse_recipe` reads."""
        parts = [str(self.linear or "float")]
        for kind in KINDS[1:]:
            expected = _for_convolutions(self.linear) if kind == "conv" else self.linear
            if self.setting(kind) != expected:
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
    if not found:
        known = [f"w{b}a{a}" for b in (8, 4, 3, 2) for a in (16, 8)]
        known += ["ternary", "fp8a16", "mxfp4a16", "mxfp4a8"]
        raise InputError(f"no weight format {word!r}", f"{did_you_mean(word, known)}; {_HINT}")
    kind = found[1]
    bits = 2 if kind == "ternary" else int(kind[-1])
    form = Format(
        bits,
        activations=int(found[2] or 16),
        ternary=kind == "ternary",
        code=kind if kind in _FLOATS else "integer",
    )
    said: dict[str, str] = {}
    for option in options:
        about = {"sym": "zero points", "asym": "zero points", "static": option}.get(option, "group")
        if said.setdefault(about, option) != option:
            raise InputError(
                f"{text!r} says both {said[about]!r} and {option!r}", f"keep one; {_HINT}"
            )
        if option == "channel":
            form = dataclasses.replace(form, group=0)
        elif option == "static":
            form = dataclasses.replace(form, group=0, static=True)
        elif option in ("sym", "asym"):
            form = dataclasses.replace(form, symmetric=option == "sym")
        elif re.fullmatch(r"g\d+", option):
            form = dataclasses.replace(form, group=_group(int(option[1:])))
        else:
            raise InputError(f"{text!r}: what is {option!r}?", _HINT)
    _check(form, text)
    return form


def _group(length: int) -> int:
    if length not in _GROUPS:
        raise InputError(
            f"a group of {length} weights", f"groups are {', '.join(map(str, _GROUPS))}"
        )
    return length


def _check(form: Format, text: str) -> None:
    """Refuse what the words allow and the formats do not have."""
    if not form.symmetric and (form.ternary or not form.integer):
        what = "ternary codes" if form.ternary else f"{form.code} codes"
        raise InputError(f"{text!r}: {what} have no zero points", "leave -asym out")
    plain = form.integer and form.symmetric and form.bits == 8 and not form.group
    if form.static and (form.activations != 8 or not plain):
        raise InputError(
            f"{text!r}: static activations go with 8 bits and one scale a row", "write w8a8-static"
        )
    if form.code == "mxfp4" and form.group != 32:
        raise InputError(f"{text!r}: mxfp4 has blocks of 32", "leave the group out")
    if form.code == "fp8" and form.activations == 8:
        raise InputError(
            f"{text!r}: activations rounded to 8 bits are for products of integers",
            "use fp8a16, or w8a8",
        )


def parse_setting(text: str) -> Setting | None:
    """Read ``FORMAT[:METHOD][+rotate]``, or ``float`` for no quantization (None).

    Raises:
        InputError: it is neither.
    """
    if text.strip().lower() == "float":
        return None
    base, *options = text.strip().lower().split("+")
    for option in options:
        if option != "rotate":
            raise InputError(f"no option {option!r}", "as in w4a8:gptq+rotate")
    name, colon, method = base.partition(":")
    if colon and method not in METHODS:
        raise InputError(f"no method {method!r}", did_you_mean(method, METHODS))
    return Setting(parse_format(name), method or "rtn", bool(options))


def parse_recipe(text: str) -> Recipe:
    """Read ``SETTING[, KIND=SETTING …]``, kinds ``embedding``, ``head``, ``experts``, ``conv``.

    Experts follow the first setting, symmetric, and with one scale a row from 8 bits up. Embedding
    and head follow it from 8 bits up; below, they are kept at 8 bits with the same activations,
    since they carry most of the damage for few bytes. Convolutions have 8 bits, a scale for each
    output channel, and static activations if the first setting rounds them.

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
            kept, format=dataclasses.replace(kept.format, activations=16, static=False)
        )
    experts = linear
    if experts is not None:
        group = 0 if experts.format.bits == 8 else experts.format.group
        plain = dataclasses.replace(experts.format, group=group, symmetric=True, static=False)
        experts = dataclasses.replace(experts, format=plain)
    recipe = Recipe(linear, embedding, kept, experts, _for_convolutions(linear))
    for other in others:
        kind, equals, setting = other.partition("=")
        kind = kind.strip().lower()
        if not equals or kind not in KINDS[1:]:
            raise InputError(
                f"{other.strip()!r} is no KIND=FORMAT",
                f"{did_you_mean(kind, KINDS[1:])}; as in head=w8a16 or embedding=float",
            )
        if kind in recipe.named:
            raise InputError(f"{text!r} names {kind} twice", "keep one")
        found = conv_setting(parse_setting(setting)) if kind == "conv" else parse_setting(setting)
        named = recipe.named | {kind}
        recipe = dataclasses.replace(recipe, named=named, **{kind: found})
    return recipe


def _for_convolutions(linear: Setting | None) -> Setting | None:
    """What convolutions get where the recipe does not name them."""
    if linear is None:
        return None
    rounded = linear.format.activations == 8
    return Setting(Format(8, 0, activations=8 if rounded else 16, static=rounded))


def conv_setting(asked: Setting | None) -> Setting | None:
    """A setting as convolutions can have it: a scale for each output channel, no blocks.

    Raises:
        InputError: they cannot have it.
    """
    if asked is None:
        return None
    form = asked.format
    static = form.activations == 8
    fits = form.integer and not form.ternary and form.bits in CONV_BITS
    if not fits or (static and (form.bits != 8 or not form.symmetric)):
        raise InputError(
            f"convolutions cannot have {str(form)!r}",
            "they take w8a8 (static activations), w8a16 and w4a16",
        )
    return Setting(dataclasses.replace(form, group=0, static=static))
