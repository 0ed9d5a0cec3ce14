"""A whole quantized model for narrower descriptors: right, and made of what these allow only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tvm")

import hal
from hal.kernels.quantized_layout import byte_dot
from hal.targets import resolve
from hal.targets.tvm import compilation
from tests import models
from tests.kernels.assembly import Allowed, multiplications, names
from tests.kernels.support import runs_here

NARROWER = {
    "none": "",
    "without its dot product": "features = []",
    "with 128 bits": "[vector]\nbits = 128\nregisters = 16",
    "with 256 bits": "[vector]\nbits = 256\nregisters = 16",
}
"""What descriptors say that claim less than this machine has."""

_PRODUCTS = 32
"""Multiplications in an inner loop of a product of quantized weights, at least."""


def compiled(target: Path, model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Compile, with verification, and give the assembly of the build."""
    texts = []
    make = compilation.compile_module

    def kept(*arguments: Any) -> Any:
        library = make(*arguments)
        texts.extend(m.inspect_source("asm") for m in library.mod.imports if m.kind == "llvm")
        return library

    monkeypatch.setattr(compilation, "compile_module", kept)
    hal.compile(
        model, target=f"{target}:tvm", quantize="w4a8", fallback=False, output=folder / "out"
    )
    return "\n".join(texts)


@pytest.mark.parametrize("less", NARROWER)
def test_a_quantized_language_model_is_right_and_uses_only_what_is_allowed(
    less: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if runs_here("host").family != "x86-64":
        pytest.skip("assembly is read for x86-64 only")
    # The name is part of what a build is cached by, so this one is made anew.
    name = f"assembly-{list(NARROWER).index(less)}"
    file = tmp_path / "chip.toml"
    file.write_text(f'schema = 1\nname = "{name}"\nextends = "host"\n{NARROWER[less]}\n')
    described = resolve(str(file)).descriptor
    text = compiled(
        file, models.save("llama", tmp_path / "model", num_hidden_layers=1), tmp_path, monkeypatch
    )
    allowed = Allowed.by(described)
    found = allowed.violations(text)
    assert not found, (names(found), found[:5])
    assert multiplications(text, allowed, integer=byte_dot(described) is not None) >= _PRODUCTS


def test_a_name_that_implies_more_is_held_to_the_descriptor(tmp_path: Path) -> None:
    """LLVM forms dot products itself where the processor has them, unless it is told not to."""
    from hal.targets.tvm.target import tvm_target

    file = tmp_path / "chip.toml"
    route = '[routes.tvm]\ntarget = { kind = "llvm", mcpu = "znver4" }'
    file.write_text(f'schema = 1\nname = "chip"\nextends = "x86-64-v4"\n{route}\n')
    described = resolve(str(file)).descriptor
    assert "-avx512vnni" in tvm_target(described)["mattr"]
    file.write_text(file.read_text().replace("[routes", 'features = ["avx512_vnni"]\n[routes'))
    described = resolve(str(file)).descriptor
    assert "+avx512vnni" in tvm_target(described)["mattr"]
    stated = route.replace(" }", ', mattr = ["-avx512vnni"], vector-width = 256 }')
    file.write_text(f'schema = 1\nname = "chip"\nextends = "host"\n{stated}\n')
    target = tvm_target(resolve(str(file)).descriptor)
    assert target["mattr"].count("-avx512vnni") == 1
    assert "+avx512vnni" not in target["mattr"]
    assert target["vector-width"] == 256
