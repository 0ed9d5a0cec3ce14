"""Instructions of the library's descriptors against the LLVM that comes with TVM."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

tvm = pytest.importorskip("tvm")

from tvm import tirx  # noqa: E402
from tvm.script.ir_builder import IRBuilder  # noqa: E402
from tvm.tirx.script import builder as T  # noqa: E402, N812

from hal.descriptor import Descriptor, Instruction, TvmRoute  # noqa: E402
from hal.kernels.emitting import ATTRIBUTES, i64, vector  # noqa: E402
from hal.kernels.quantized_layout import Layout, byte_dot  # noqa: E402
from hal.kernels.quantized_matmul import matmul  # noqa: E402
from hal.targets import Registry, resolve  # noqa: E402
from hal.targets.tvm.target import tvm_target  # noqa: E402

ROUTELESS: dict[str, dict[str, Any]] = {
    "wasm32": {"kind": "llvm", "mtriple": "wasm32-unknown-unknown"},
    "armv7e-m": {"kind": "llvm", "mtriple": "thumbv7em-none-eabi", "mcpu": "cortex-m4"},
    "armv8.1-m-mve": {"kind": "llvm", "mtriple": "thumbv8.1m.main-none-eabi"},
}
"""Targets for descriptors that no backend compiles for yet."""

MNEMONICS = {
    "llvm.x86.sse2.pmadd.wd": "pmaddwd",
    "llvm.x86.avx2.pmadd.wd": "vpmaddwd",
    "llvm.x86.avx512.pmaddw.d.512": "vpmaddwd",
    "llvm.x86.avx2.pmadd.ub.sw": "vpmaddubsw",
    "llvm.x86.avx512.pmaddubs.w.512": "vpmaddubsw",
    "llvm.x86.avx512.vpdpbusd.128": "vpdpbusd",
    "llvm.x86.avx512.vpdpbusd.256": "vpdpbusd",
    "llvm.x86.avx512.vpdpbusd.512": "vpdpbusd",
    "llvm.aarch64.neon.sdot.v4i32.v16i8": "sdot",
    "llvm.aarch64.neon.udot.v4i32.v16i8": "udot",
    "llvm.aarch64.neon.usdot.v4i32.v16i8": "usdot",
    "llvm.aarch64.neon.smmla.v4i32.v16i8": "smmla",
    "llvm.aarch64.neon.ummla.v4i32.v16i8": "ummla",
    "llvm.aarch64.neon.usmmla.v4i32.v16i8": "usmmla",
    "llvm.wasm.dot": "i32x4.dot_i16x8_s",
    "llvm.wasm.relaxed.dot.i8x16.i7x16.add.signed": "i32x4.relaxed_dot_i8x16_i7x16_add_s",
    "llvm.wasm.relaxed.madd.v4f32": "f32x4.relaxed_madd",
    "llvm.arm.smlad": "smlad",
    "llvm.arm.mve.vmldava.v16i8": "vmlava.s8",
    "llvm.arm.mve.vmldava.v8i16": "vmlava.s16",
}
"""What an intrinsic becomes; ``llvm.fma`` becomes something with ``fm`` everywhere."""

_LAST = ("llvm.wasm.relaxed", "llvm.fma.", "llvm.arm.smlad")
"""Prefixes of intrinsics whose accumulator comes last."""

_NONE = ("pmadd", "llvm.wasm.dot")
"""Parts of names of intrinsics that have no accumulator."""


def library() -> dict[str, Descriptor]:
    registry = Registry.discover("")
    return {name: registry.descriptor(name) for name in registry.names() if name != "host"}


LIBRARY = library()
ENTRIES = [
    pytest.param(name, i, id=f"{name}-{i.llvm}")
    for name, described in LIBRARY.items()
    for i in described.instructions
    if i.llvm
]

COMPILED = list(
    {
        (i.llvm, i.llvm_features): pytest.param(name, i, id=f"{name}-{i.llvm}")
        for name, described in LIBRARY.items()
        for i in described.instructions
        if i.llvm in MNEMONICS or str(i.llvm).startswith("llvm.fma.v")
    }.values()
)
"""Intrinsics that are compiled, each once."""


def target_for(name: str, i: Instruction) -> dict[str, Any]:
    """The target with everything that the instruction asks for."""
    described = LIBRARY[name]
    features = sorted({*described.features, *i.requires})
    described = described.model_copy(update={"features": tuple(features)})
    return compiled_by(described) | ({} if routed(described) else {"mattr": list(i.llvm_features)})


def routed(described: Descriptor) -> bool:
    """Whether TVM compiles for a chip."""
    return any(isinstance(route, TvmRoute) for route in described.routes.values())


def compiled_by(described: Descriptor) -> dict[str, Any]:
    """The target of a chip, or of the nearest parent that has one here."""
    if routed(described):
        return tvm_target(described)
    name = described.name
    while name not in ROUTELESS:
        name = LIBRARY[name].extends or ""
    return ROUTELESS[name]


def dtype(name: str) -> str:
    """``i8`` as TVM says it; bytes are bytes to LLVM."""
    kind = {"i": "int", "u": "int", "f": "float"}[name[0]]
    return kind + name[1:]


@dataclasses.dataclass(frozen=True)
class Operand:
    kind: str
    lanes: int


def operands(i: Instruction) -> tuple[list[Operand], Operand]:
    """Operands of the intrinsic in its order, and its result."""
    result = Operand(dtype(i.types[-1]), i.lanes)
    # A matrix [2, k] times [k, 2] has four results.
    size = 2 * i.k if i.does == "matrix" else i.lanes * i.k
    factors = [Operand(dtype(t), size) for t in i.types[:2]]
    assert i.llvm is not None
    if i.llvm == "llvm.arm.smlad":  # pairs of 16 bits in a word
        factors = [Operand("int32", 1)] * 2
    if any(part in i.llvm for part in _NONE):
        return factors, result
    return ([*factors, result] if i.llvm.startswith(_LAST) else [result, *factors]), result


def assembly(i: Instruction, target: dict[str, Any]) -> str:
    """A function that calls the intrinsic once, compiled."""
    arguments, result = operands(i)

    def place(operand: Operand) -> Any:
        return tirx.Ramp(i64(0), i64(1), operand.lanes) if operand.lanes > 1 else i64(0)

    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("kernel")
        handles = [T.arg(f"p{n}", T.handle()) for n in range(len(arguments) + 1)]
        T.func_attr(ATTRIBUTES)
        buffers = [
            T.match_buffer(handle, (operand.lanes,), operand.kind)
            for handle, operand in zip(handles, [*arguments, result], strict=True)
        ]
        with T.sblock("root"):
            T.reads([buffer[0:1] for buffer in buffers[:-1]])
            T.writes([buffers[-1][0:1]])
            values = [b[place(o)] for b, o in zip(buffers, arguments, strict=False)]
            zero = tirx.const(0, "int32")
            flags = [zero] * 3 if "vmldava" in str(i.llvm) else []
            kind = vector(result.kind, result.lanes)
            call = tirx.call_llvm_pure_intrin(kind, i.llvm, *flags, *values)
            T.buffer_store(buffers[-1], call, [place(result)])
    return text_of(builder.get(), target)


def text_of(kernel: Any, target: dict[str, Any]) -> str:
    module = tvm.IRModule({"kernel": kernel.with_attr("global_symbol", "kernel")})
    built = tvm.compile(module, target=tvm.target.Target(target))
    return str(built.mod.inspect_source("asm"))


def words(text: str) -> set[str]:
    """First words of lines, where assembly has its mnemonics."""
    found = (line.split("#")[0].split() for line in text.splitlines())
    return {word for line in found for word in line[:2]}


@pytest.mark.parametrize(("name", "i"), ENTRIES)
def test_llvm_knows_every_intrinsic(name: str, i: Instruction) -> None:
    find = tvm.get_global_func("target.llvm_lookup_intrinsic_id")
    assert find("llvm.no.such.intrinsic") == 0
    assert find(i.llvm) != 0


@pytest.mark.parametrize(("name", "i"), COMPILED)
def test_an_intrinsic_becomes_its_instruction(
    name: str, i: Instruction, capfd: pytest.CaptureFixture[str]
) -> None:
    found = words(assembly(i, target_for(name, i)))
    assert "not a recognized feature" not in capfd.readouterr().err
    if str(i.llvm).startswith("llvm.fma."):
        assert any(word.startswith(("vfm", "fmla", "fmadd", "vfma")) for word in found), found
    else:
        known = MNEMONICS[str(i.llvm)]
        assert {known, "v" + known} & found  # the same by another encoding where there is one


@pytest.mark.parametrize("name", [n for n, d in LIBRARY.items() if d.instructions])
def test_llvm_knows_every_attribute(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    attributes = sorted({a for i in LIBRARY[name].instructions for a in i.llvm_features})
    target = compiled_by(LIBRARY[name])
    kernel = _copy()
    text_of(kernel, target | {"mattr": attributes})
    assert "not a recognized feature" not in capfd.readouterr().err
    text_of(kernel, target | {"mattr": ["+no-such-thing"]})
    assert "not a recognized feature" in capfd.readouterr().err


def _copy() -> Any:
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("kernel")
        handles = [T.arg(n, T.handle()) for n in ("a", "b")]
        T.func_attr(ATTRIBUTES)
        a, b = (T.match_buffer(handle, (1,), "int32") for handle in handles)
        with T.sblock("root"):
            T.reads([a[0:1]])
            T.writes([b[0:1]])
            T.buffer_store(b, a[i64(0)], [i64(0)])
    return builder.get()


@pytest.mark.parametrize(
    ("name", "feature", "mnemonic"),
    [("aarch64", "asimddp", "sdot"), ("aarch64", "i8mm", "usdot"), ("aarch64", "", "fmla")],
)
def test_the_quantized_product_for_another_machine(name: str, feature: str, mnemonic: str) -> None:
    """Compiled, not run: the template takes the instruction that the chip offers, and no other."""
    features = (feature,) if feature else ()
    described = resolve(name).descriptor.model_copy(update={"features": features})
    dot = byte_dot(described)
    assert (dot is None) == (not feature)
    layout = Layout(
        16, 64, 4, 32, 4, integer=dot is not None, signed=dot is not None and dot.signed
    )
    found = words(text_of(matmul(layout, 32, dot), tvm_target(described)))
    assert mnemonic in found
    assert not {"sdot", "usdot", "udot"} & found - {mnemonic}
